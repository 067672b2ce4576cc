// mbarriers live in their eight bytes of shared memory, so that an overwritten or uninitialised one is seen.
//
// A phase completes when no arrival and no byte is outstanding; waiting for parity p returns when the phase of parity p
// has completed, that is when the phase under way has the other parity. A fresh barrier is in phase 0.
#include "runtime.h"
#include "simt_ptx.h"

namespace simt {

namespace {
constexpr uint64_t kMagic = 0x2d;
struct Mbarrier {
  uint64_t magic : 6, fenced : 1, phase : 1, count : 12;
  int64_t pending : 14, bytes : 30;
};
static_assert(sizeof(Mbarrier) == 8);
}  // namespace

static Mbarrier* mbarrier(uint32_t address) {
  auto* m = reinterpret_cast<Mbarrier*>(shared_at(address, 8, 8, "mbarrier"));
  if (m->magic != kMagic || m->count == 0)
    fail("mbarrier at shared address %u is used before it is initialised", address % kWindow);
  return m;
}

static void maybe_complete(Mbarrier* m) {
  if (m->pending < 0) fail("mbarrier: more arrivals in a phase than its count of %u", unsigned(m->count));
  if (m->pending || m->bytes) return;
  m->pending = int64_t(m->count);
  m->phase ^= 1;
  Cluster* c = cluster();
  for (Fiber* f : c->mbarrier_waiters) wake(f);
  c->mbarrier_waiters.clear();
}

unsigned char* mbarrier_at(uint32_t address) {
  Mbarrier* m = mbarrier(address);
  if (!m->fenced)
    fail("mbarrier: no fence (mbar_fence_init) between its initialisation and the async proxy or the cluster");
  return reinterpret_cast<unsigned char*>(m);
}

void mbarrier_complete_tx(unsigned char* at, uint32_t bytes) {
  auto* m = reinterpret_cast<Mbarrier*>(at);
  if (m->magic != kMagic) fail("mbarrier: overwritten while a copy was in flight");
  m->bytes -= int64_t(bytes);
  if (m->bytes <= -(1 << 20)) fail("mbarrier: %lld bytes more than expected", -(long long)m->bytes);
  maybe_complete(m);
}

void mbarrier_init(uint32_t address, uint32_t count) {
  if (address / kWindow) fail("mbarrier.init: a block initialises its own barriers only");
  auto* m = reinterpret_cast<Mbarrier*>(shared_at(address, 8, 8, "mbarrier.init"));
  if (count < 1 || count > 4095) fail("mbarrier.init: count %u", count);
  note_write(m, 8);
  const Quiet quiet;
  *m = Mbarrier{kMagic, 0, 0, count, int64_t(count), 0};
  current()->initialised.push_back(address);
}

void mbarrier_fence() {
  const Quiet quiet;
  for (uint32_t address : current()->initialised) mbarrier(address)->fenced = 1;
  current()->initialised.clear();
}

static void expect(Mbarrier* m, uint32_t bytes) {
  m->bytes += int64_t(bytes);
  if (m->bytes >= 1 << 20) fail("mbarrier: %lld bytes expected, the limit is 2^20 - 1", (long long)m->bytes);
}

void mbarrier_arrive(uint32_t address, uint32_t bytes) {
  if (address / kWindow) mbarrier_at(address);
  Mbarrier* m = mbarrier(address);
  note_read(m, 8);
  happens_before(m);
  const Quiet quiet;
  expect(m, bytes);
  m->pending -= 1;
  maybe_complete(m);
  maybe_yield();
}

void mbarrier_expect(uint32_t address, uint32_t bytes) {
  Mbarrier* m = mbarrier(address);
  note_read(m, 8);
  const Quiet quiet;
  expect(m, bytes);
}

void mbarrier_wait(uint32_t address, uint32_t parity, const char* file, int line) {
  if (address / kWindow) fail("mbarrier wait at %s:%d: a block waits on its own barriers only", file, line);
  if (parity > 1) fail("mbarrier wait at %s:%d: parity %u", file, line, parity);
  Mbarrier* m = mbarrier(address);
  note_read(m, 8);
  {
    const Quiet quiet;
    maybe_yield();
    while (mbarrier(address)->phase == parity) {
      cluster()->mbarrier_waiters.push_back(current());
      park({"mbarrier wait", file, "", line});
    }
  }
  happens_after(m);
}

void fence_async() {
  mbarrier_fence();
  const Quiet quiet;
  publish(current()->block);  // everybody's writes, not only the caller's: see README.md
}

}  // namespace simt
