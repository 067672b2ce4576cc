// Shared memory (poisoned, ending at a guard page), guarded global memory, and the report of a wild access.
#include <signal.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <unordered_map>

#include "runtime.h"
#include "simt_ptx.h"

namespace simt {

constexpr unsigned char kPoison = 0xff;  // NaN as float, half and bfloat16, -1 as an integer

void poison(void* p, size_t bytes) {
  std::memset(p, kPoison, bytes);
}

static unsigned char* map(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<unsigned char*>(p);
}

static uint32_t round_up(uint32_t n, uint32_t to) {
  return (n + to - 1) / to * to;
}

static std::mutex g_mutex;
static std::unordered_map<const void*, size_t>& allowances() {
  static std::unordered_map<const void*, size_t> map;
  return map;
}

void allow_shared(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  allowances()[kernel] = bytes;
}

size_t shared_limit(const void* kernel, bool all) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  const auto found = allowances().find(kernel);
  if (found == allowances().end()) return kDefaultShared;
  return all ? kMaxShared : std::max<size_t>(found->second, kDefaultShared);
}

static void prepare(Block* b, const StaticArray& a) {  // poisoned up to its guard page
  const uint32_t end = round_up(a.offset + a.bytes, kPage);
  mprotect(b->shared.base + end, kPage, PROT_NONE);
  poison(b->shared.base + a.offset, end - a.offset);
  poison(b->shared.async + a.offset, end - a.offset);
}

void forget_statics(Cluster* c) {
  for (auto& b : c->blocks)
    if (b->shared.base) mprotect(b->shared.base + kStaticBegin, kWindow - kStaticBegin, PROT_READ | PROT_WRITE);
  c->statics.clear();
  c->static_end = kStaticBegin;
  c->static_bytes = 0;
}

void make_shared(Block* b, const Launch& launch) {
  Shared& s = b->shared;
#if defined(SIMT_TSAN)
  if (s.base) munmap(s.base, kWindow);  // a new mapping has no history: blocks do not race through reused memory
  s.base = nullptr;
#endif
  if (!s.base) {
    s.base = map(kWindow);
    mprotect(s.base + kDynamicEnd, kPage, PROT_NONE);
  }
  if (!s.async) s.async = map(kWindow);
  s.dynamic_bytes = uint32_t(launch.shared);
  s.dynamic = kDynamicEnd;
  s.dynamic_used = false;
  const uint32_t from = kDynamicEnd - round_up(s.dynamic_bytes, 1024);
  poison(s.base + from, kDynamicEnd - from);
  poison(s.async + from, kDynamicEnd - from);
  for (const StaticArray& a : b->cluster->statics) prepare(b, a);
}

Block::~Block() {
  for (unsigned char* view : {shared.base, shared.async})
    if (view) munmap(view, kWindow);
}

void* dynamic_shared(size_t align) {
  const Quiet quiet;
  Block* b = current()->block;
  Shared& s = b->shared;
  const uint32_t at = kDynamicEnd - round_up(s.dynamic_bytes, uint32_t(align));
  if (s.dynamic_used && s.dynamic != at) fail("DYN_SMEM and DYN_SMEM_1024 in one kernel");
  s.dynamic_used = true;
  s.dynamic = at;
  return s.base + at;
}

void* static_shared(const void* key, const char* name, size_t bytes, size_t align) {
  const Quiet quiet;
  Cluster* c = cluster();
  unsigned char* base = current()->block->shared.base;
  for (const StaticArray& a : c->statics)
    if (a.key == key) return base + a.offset;
  const uint32_t size = round_up(uint32_t(bytes), uint32_t(std::max<size_t>(align, 16)));
  const uint32_t end = round_up(c->static_end + size, kPage);
  if (end + kPage > kWindow) fail("STATIC_SMEM %s: no room left in the bench's window", name);
  c->static_end = end + kPage;
  c->static_bytes += uint32_t(bytes);
  const size_t limit = shared_limit(c->launch->kernel, true);
  if (c->static_bytes > kDefaultShared || c->static_bytes + c->launch->shared > limit)
    fail("shared memory: %u bytes of static arrays and %zu dynamic ones exceed the limit of %zu", c->static_bytes,
         c->launch->shared, limit);
  c->statics.push_back({key, name, end - size, uint32_t(bytes)});
  for (auto& b : c->blocks) prepare(b.get(), c->statics.back());
  return base + c->statics.back().offset;
}

static void check_end(Block* b, uint32_t end, uint32_t guard, const char* name) {
  for (uint32_t i = end; i < guard; ++i)
    if (b->shared.base[i] != kPoison)
      fail("shared memory: block (%u,%u,%u) wrote %u bytes past the end of %s", b->index.x, b->index.y, b->index.z,
           i - end, name);
}

void check_slack(Block* b) {
  Shared& s = b->shared;
  if (s.dynamic_used) check_end(b, s.dynamic + s.dynamic_bytes, kDynamicEnd, "dynamic shared memory");
  for (const StaticArray& a : b->cluster->statics)
    check_end(b, a.offset + a.bytes, round_up(a.offset + a.bytes, kPage), a.name);
}

// ---- shared addresses: bits 0-19 an offset in a window, above them 1 + the rank of a block of the cluster, or 0

uint32_t shared_address(const void* p) {
  const Shared& s = current()->block->shared;
  const auto offset = static_cast<const unsigned char*>(p) - s.base;
  if (offset < 0 || offset >= ptrdiff_t(kWindow)) fail("smem_u32: %p is no address of this block's shared memory", p);
  return uint32_t(offset);
}

Block* block_at(uint32_t address) {
  Cluster* c = cluster();
  const uint32_t who = address / kWindow;
  if (who == 0) return current()->block;
  if (who > c->blocks.size())
    fail("shared address %08x names no block of this cluster of %zu", address, c->blocks.size());
  Block* b = c->blocks[who - 1].get();
  if (b->alive == 0) fail("shared memory of block %u of the cluster, which has exited", who - 1);
  return b;
}

static uint32_t checked_offset(const Block* b, uint32_t address, uint32_t bytes, uint32_t align, const char* what) {
  const Shared& s = b->shared;
  const uint32_t at = address % kWindow;
  if (at % align) fail("%s: shared address %u is not aligned to %u bytes", what, at, align);
  if (at >= s.dynamic && at + bytes <= s.dynamic + s.dynamic_bytes) return at;
  for (const StaticArray& a : b->cluster->statics)
    if (at >= a.offset && at + bytes <= a.offset + a.bytes) return at;
  fail("%s: [%d, %d) lies outside the %u bytes of dynamic shared memory", what, int(at) - int(s.dynamic),
       int(at) - int(s.dynamic) + int(bytes), s.dynamic_bytes);
}

unsigned char* shared_at(uint32_t address, uint32_t bytes, uint32_t align, const char* what) {
  Block* b = block_at(address);
  return b->shared.base + checked_offset(b, address, bytes, align, what);
}

unsigned char* async_at(uint32_t address, uint32_t bytes, uint32_t align, const char* what) {
  Block* b = block_at(address);
  return b->shared.async + checked_offset(b, address, bytes, align, what);
}

void publish(Block* b) {
  Shared& s = b->shared;
  if (s.dynamic_used) std::memcpy(s.async + s.dynamic, s.base + s.dynamic, s.dynamic_bytes);
  for (const StaticArray& a : b->cluster->statics) std::memcpy(s.async + a.offset, s.base + a.offset, a.bytes);
}

// ---- global memory that ends at a guard page

namespace {
struct Guarded {
  size_t bytes, slack, mapped;
  unsigned char* mapping;
};
}  // namespace
static std::map<uintptr_t, Guarded>& guarded() {
  static std::map<uintptr_t, Guarded> map;
  return map;
}

void* guarded_alloc(size_t bytes, size_t offset) {
  const size_t body = (bytes + 16 + kPage - 1) / kPage * kPage, total = body + 2 * kPage;
  unsigned char* mapping = map(total);
  mprotect(mapping, kPage, PROT_NONE);
  mprotect(mapping + kPage + body, kPage, PROT_NONE);
  poison(mapping + kPage, body);
  const uintptr_t end = uintptr_t(mapping) + kPage + body;
  uintptr_t at = (end - bytes) / 16 * 16 + offset % 16;
  if (at + bytes > end) at -= 16;
  const std::lock_guard<std::mutex> lock(g_mutex);
  guarded()[at] = {bytes, end - at - bytes, total, mapping};
  return reinterpret_cast<void*>(at);
}

void guarded_free(void* p) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  const auto found = guarded().find(uintptr_t(p));
  if (found == guarded().end()) throw std::logic_error("guarded_free of memory that guarded_alloc did not give");
  const Guarded g = found->second;
  const auto* end = static_cast<unsigned char*>(p) + g.bytes;
  size_t dirty = 0;
  for (size_t i = 0; i < g.slack; ++i) dirty += end[i] != kPoison;
  guarded().erase(found);
  munmap(g.mapping, g.mapped);
  if (dirty) throw Error("a kernel wrote past the end of a buffer of " + std::to_string(g.bytes) + " bytes");
}

static std::string whose(uintptr_t at) {
  char text[200];
  for (auto& b : cluster()->blocks) {
    const Shared& s = b->shared;
    const auto from = at - uintptr_t(s.base);
    if (from >= kWindow) continue;
    if (from < kStaticBegin) {
      std::snprintf(text, sizeof text, "byte %d of %u bytes of dynamic shared memory", int(from) - int(s.dynamic),
                    s.dynamic_bytes);
      return text;
    }
    for (const StaticArray& a : b->cluster->statics)
      if (from >= a.offset && from < round_up(a.offset + a.bytes, kPage) + kPage) {
        std::snprintf(text, sizeof text, "byte %d of the %u bytes of %s", int(from) - int(a.offset), a.bytes, a.name);
        return text;
      }
  }
  for (auto& [start, g] : guarded())
    if (at >= uintptr_t(g.mapping) && at < uintptr_t(g.mapping) + g.mapped) {
      std::snprintf(text, sizeof text, "byte %td of a buffer of %zu bytes", ptrdiff_t(at - start), g.bytes);
      return text;
    }
  std::snprintf(text, sizeof text, "address %#zx, which is no memory of this launch", size_t(at));
  return text;
}

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};  // the last two: traps that the compiler planted
static struct sigaction g_before[4];

// Runs on a stack of its own, because the fault may be an overflow of the fiber's.
static void on_fault(int number, siginfo_t* info, void*) {
  if (!self) {  // not a kernel's: whoever was here before us takes it
    for (int i = 0; i < 4; ++i)
      if (kSignals[i] == number) sigaction(number, &g_before[i], nullptr);
    return;
  }
  if (number == SIGILL || number == SIGTRAP) fail("misaligned access, or an index past the end of an array");
  const auto at = uintptr_t(info->si_addr);
  if (at - uintptr_t(current()->stack) < kPage) fail("stack overflow");
  fail("wild access: %s", whose(at).c_str());
}

// For the life of a launch only: the process has other owners of these signals, among them another copy of the bench.
static int g_catching = 0;
CatchWildAccesses::CatchWildAccesses() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (g_catching++) return;
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &g_before[i]);
}
CatchWildAccesses::~CatchWildAccesses() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (--g_catching) return;
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &g_before[i], nullptr);
}

// The stack of on_fault, for as long as this OS thread runs kernels.
SignalStack::SignalStack() : memory_(map(kBytes)) {
  stack_t mine{};
  mine.ss_sp = memory_;
  mine.ss_size = kBytes;
  sigaltstack(&mine, &before_);
}
SignalStack::~SignalStack() {
  sigaltstack(&before_, nullptr);
  munmap(memory_, kBytes);
}

// ---- shared memory of the cluster's other blocks

uint32_t map_to_rank(uint32_t address, uint32_t rank) {
  if (rank >= cluster()->blocks.size()) fail("mapa: rank %u in a cluster of %zu", rank, cluster()->blocks.size());
  return address % kWindow + (rank + 1) * kWindow;
}

void cluster_load(uint32_t address, void* to, uint32_t bytes) {
  const unsigned char* from = shared_at(address, bytes, bytes, "ld.shared::cluster");
  note_read(from, bytes);
  const Quiet quiet;
  std::memcpy(to, from, bytes);
}

void cluster_store(uint32_t address, const void* from, uint32_t bytes) {
  unsigned char* to = shared_at(address, bytes, bytes, "st.shared::cluster");
  note_write(to, bytes);
  const Quiet quiet;
  std::memcpy(to, from, bytes);
}

uint32_t cluster_rank() {
  return current()->block->rank;
}
uint32_t cluster_size() {
  return uint32_t(cluster()->blocks.size());
}

}  // namespace simt
