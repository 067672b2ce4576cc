// The bench's own structures. An OS thread runs one cluster at a time (a plain launch has clusters of one block); each
// CUDA thread of the cluster is a fiber, and exactly one of them runs until it parks.
//
//   fiber.cpp      the switch from one stack to another
//   schedule.cpp   who runs next, parking, the report of who waits where
//   warp.cpp       collectives of a warp          barrier.cpp   barriers of a block, named ones, those of a cluster
//   memory.cpp     shared memory, guarded global memory, wild accesses
//   launch.cpp     clusters over OS threads
//   async.cpp      cp.async    mbarrier.cpp   mbarriers    tma.cpp   bulk copies and tensor maps
//   tensor_core.cpp   ldmatrix, mma.sync      wgmma.cpp    wgmma
#pragma once
#include <signal.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "sanitizer.h"
#include "simt_device.h"

namespace simt {

enum class State : uint8_t { ready, waiting, done };

struct Place {  // where a thread stands
  const char *what = "start", *file = "", *name = "";
  int line = 0;
};

struct Copy {  // one cp.async: `given` bytes from global memory, zeros after them
  unsigned char* to;
  const void* from;
  uint32_t bytes, given;
};
struct BulkStore {  // a bulk copy out of shared memory; reads its source late
  std::function<void()> run;
  uint32_t group;
};
struct Product {  // one wgmma as a lane issued it
  uint32_t n, group;
  bool bf16, a_in_registers, a_mn_major, b_mn_major, accumulate;
  uint64_t a, b;
  uint32_t fragment[4];
  float* d;
};
struct Accumulator {  // the true value of registers that a wgmma in flight holds
  float* d;
  uint32_t count;
  std::vector<float> value;
};

struct Block;
struct Cluster;

struct Fiber : Thread {
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Block* block = nullptr;
  uint32_t linear = 0, warp = 0, lane = 0;
  State state = State::ready;
  Place place;
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  void *fake_stack = nullptr, *tsan = nullptr;
  int votes = 0;  // the result of the barrier that released it

  std::vector<Copy> copies;
  std::vector<size_t> copy_groups;  // index in `copies` past the end of each committed group
  std::vector<BulkStore> stores;
  uint32_t store_group = 0;
  std::vector<Product> products;
  std::vector<Accumulator> accumulators;
  uint32_t product_group = 0, products_issued = 0;
  bool fenced = false;
  uint32_t cluster_phase = 0;
  bool cluster_arrived = false;
  std::vector<uint32_t> initialised;  // mbarriers without a fence so far
};

struct Meeting {  // lanes of one warp on their way through one collective
  uint32_t mask = 0, arrived = 0;
  Place place;
  void* slot[32] = {};
};
struct Warp {
  uint32_t exists = 0, ready = 0, done = 0, priority = 0;
  Meeting meetings[32];
  char sync = 0;  // addresses that happens_before and happens_after name
};
struct Barrier {
  uint32_t count = 0, expected = 0;
  int votes = 0;
  Place first;
  std::vector<Fiber*> waiting;
  char sync = 0;
};

// A block's shared memory: a window of 1 MB. Dynamic memory ends at the guard page at 256 KB, where the 18-bit
// addresses of matrix descriptors end too; static arrays follow, each ending at a guard page of its own.
constexpr uint32_t kWindow = 1 << 20, kDynamicEnd = 256 << 10, kPage = 4096;
constexpr uint32_t kStaticBegin = kDynamicEnd + kPage, kMaxShared = 227 << 10, kDefaultShared = 48 << 10;
struct Shared {
  unsigned char* base = nullptr;   // as ordinary loads and stores see it
  unsigned char* async = nullptr;  // as the async proxy sees it: what was fenced, and what it wrote itself
  uint32_t dynamic = kDynamicEnd, dynamic_bytes = 0;
  bool dynamic_used = false;
};
struct StaticArray {  // at the same place in every block of a cluster
  const void* key;
  const char* name;
  uint32_t offset, bytes;
};

struct Block : BlockIds {
  Block() = default;
  ~Block();
  Block(const Block&) = delete;
  Cluster* cluster = nullptr;
  uint32_t rank = 0, alive = 0, first_warp = 0;  // first_warp: index in the cluster's list
  std::vector<std::unique_ptr<Fiber>> fibers;
  Barrier barriers[16];
  Shared shared;
};

struct Launch {
  const char* name;
  const void* kernel;
  dim3 grid, block, cluster;
  size_t shared;
  void (*body)(void*);
  void* context;
  Config config;
  uint32_t threads, blocks_per_cluster;
  char start = 0, end = 0;
};

struct Cluster {
  Launch* launch = nullptr;
  std::vector<std::unique_ptr<Block>> blocks;
  std::deque<Warp> warps;
  std::vector<StaticArray> statics;  // of this launch, in the order in which they were met
  uint32_t static_end = kStaticBegin, static_bytes = 0;
  uint32_t warp = 0, lane = 31;  // that ran last
  uint32_t alive = 0, phase = 0, arrived = 0;
  char sync = 0;
  std::vector<std::function<void()>> pending;  // asynchronous work that has not landed
  std::vector<Fiber*> mbarrier_waiters, cluster_waiters;
  uint64_t random_state = 1;
  std::string error;
  void *main_stack_pointer = nullptr, *main_fake_stack = nullptr, *main_tsan = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;

  uint64_t random();
  bool late() const { return launch->config.landing == kLate; }
  void land(std::function<void()> work);  // now, or when the schedule says so
};

inline Fiber* current() {
  return static_cast<Fiber*>(self);
}
inline Cluster* cluster() {
  return current()->block->cluster;
}
inline Warp& warp_of(Fiber* f) {
  return f->block->cluster->warps[f->block->first_warp + f->warp];
}

// fiber.cpp
void make_stack(Fiber* f);
void reset_stack(Fiber* f);  // its next switch enters the kernel
void switch_fibers(Fiber* from, Fiber* to);
void enter_fibers(Cluster* c, Fiber* first);  // from the OS thread's stack; returns when somebody leaves
[[noreturn]] void leave_fibers();
void thread_main();  // schedule.cpp: runs the kernel on the current fiber

// schedule.cpp
Fiber* pick(Cluster* c);
void park(const Place& place);  // until somebody wakes this fiber
void wake(Fiber* f);
std::string who_waits(Cluster* c);

// warp.cpp: true for the last lane to arrive, which acts for all by their slots and then calls release(); false for the
// others, once they have been released.
bool meet(uint32_t mask, void* argument, const Place& place, Meeting** meeting);
void release(Meeting* m);

// barrier.cpp
void leave_barriers(Fiber* f);  // of an exiting thread

// memory.cpp
void forget_statics(Cluster* c);                   // of another launch
void make_shared(Block* b, const Launch& launch);  // before each block: mapped, poisoned
void check_slack(Block* b);                        // after it: nobody wrote past an end
unsigned char* shared_at(uint32_t address, uint32_t bytes, uint32_t align, const char* what);
unsigned char* async_at(uint32_t address, uint32_t bytes, uint32_t align, const char* what);
uint32_t shared_address(const void* p);
Block* block_at(uint32_t address);                  // of the cluster; a plain shared address is the caller's own
void publish(Block* b);                             // what ordinary stores wrote becomes visible to the async proxy
size_t shared_limit(const void* kernel, bool all);  // of its dynamic memory, or of that and static arrays together
class CatchWildAccesses {                           // turns faults of kernels into errors within its life
 public:
  CatchWildAccesses();
  ~CatchWildAccesses();
};
class SignalStack {
 public:
  SignalStack();
  ~SignalStack();

 private:
  static constexpr size_t kBytes = 64 << 10;
  unsigned char* memory_;
  stack_t before_{};
};
void poison(void* p, size_t bytes);
void* guarded_alloc(size_t bytes, size_t offset);  // ends at a guard page; address = offset modulo 16
void guarded_free(void* p);                        // throws when something was written just past the end

// async.cpp, tma.cpp, wgmma.cpp: what a thread must not leave behind
void check_copies(Fiber* f);
void check_stores(Fiber* f);
void check_products(Fiber* f);
void check_warpgroups(Block* b);

// mbarrier.cpp
void mbarrier_complete_tx(unsigned char* at, uint32_t bytes);
unsigned char* mbarrier_at(uint32_t address);  // checked: initialised, and its block still runs

}  // namespace simt
