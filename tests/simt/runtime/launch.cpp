// A launch: its shape is checked, then OS threads take clusters one after another.
#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>

#include "runtime.h"

namespace simt {

Config& config() {
  static Config c;
  return c;
}

static std::mutex g_mutex;
static std::vector<std::unique_ptr<Cluster>>& idle() {
  static auto& list = *new std::vector<std::unique_ptr<Cluster>>;  // its stacks outlive static destructors
  return list;
}

static std::unique_ptr<Cluster> take() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (idle().empty()) return std::make_unique<Cluster>();
  auto c = std::move(idle().back());
  idle().pop_back();
  return c;
}

static void give_back(std::unique_ptr<Cluster> c) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  idle().push_back(std::move(c));
}

// Stacks and structures for the shape of this launch; what an earlier one left is used again.
static void shape(Cluster* c, Launch* launch) {
  c->launch = launch;
  while (c->blocks.size() < launch->blocks_per_cluster) {
    c->blocks.push_back(std::make_unique<Block>());
    c->blocks.back()->cluster = c;
  }
  c->blocks.resize(launch->blocks_per_cluster);
  forget_statics(c);
  const uint32_t warps = (launch->threads + 31) / 32;
  c->warps.resize(warps * launch->blocks_per_cluster);
  const dim3 d = launch->block;
  for (uint32_t rank = 0; rank < launch->blocks_per_cluster; ++rank) {
    Block* b = c->blocks[rank].get();
    b->dim = d, b->grid = launch->grid, b->rank = rank, b->first_warp = rank * warps;
    while (b->fibers.size() < launch->threads) {
      auto f = std::make_unique<Fiber>();
      f->ids = f->block = b;
      make_stack(f.get());
      b->fibers.push_back(std::move(f));
    }
    for (uint32_t i = 0; i < launch->threads; ++i) {
      Fiber* f = b->fibers[i].get();
      f->linear = i, f->warp = i / 32, f->lane = i % 32;
      f->index = {i % d.x, i / d.x % d.y, i / (d.x * d.y)};
    }
  }
}

static void start(Fiber* f) {
  f->state = State::ready;
  f->place = {};
  f->copies.clear(), f->copy_groups.clear(), f->stores.clear();
  f->products.clear(), f->accumulators.clear();
  f->store_group = f->product_group = f->products_issued = 0;
  f->fenced = f->cluster_arrived = false;
  reset_stack(f);
}

static void run(Cluster* c, uint64_t number) {
  const Launch& l = *c->launch;
  const dim3 n = {l.grid.x / l.cluster.x, l.grid.y / l.cluster.y, l.grid.z / l.cluster.z};  // clusters
  const uint3 at = {unsigned(number % n.x), unsigned(number / n.x % n.y), unsigned(number / n.x / n.y)};
  c->random_state = (l.config.seed * 0x9E3779B97F4A7C15ull ^ (number + 1) * 0xD1B54A32D192ED03ull) | 1;
  for (int i = 0; i < 4; ++i) c->random();
  c->error.clear();
  c->pending.clear(), c->mbarrier_waiters.clear(), c->cluster_waiters.clear();
  c->phase = c->arrived = 0;
  c->alive = l.threads * l.blocks_per_cluster;
  for (Warp& w : c->warps) w.priority = uint32_t(c->random() % 65536);
  for (auto& b : c->blocks) {
    const uint32_t r = b->rank;
    b->index = {at.x * l.cluster.x + r % l.cluster.x, at.y * l.cluster.y + r / l.cluster.x % l.cluster.y,
                at.z * l.cluster.z + r / (l.cluster.x * l.cluster.y)};
    b->alive = l.threads;
    for (Barrier& bar : b->barriers) bar.count = 0, bar.votes = 0, bar.waiting.clear();
    make_shared(b.get(), l);
    for (uint32_t w = 0; w * 32 < l.threads; ++w) {
      Warp& warp = c->warps[b->first_warp + w];
      const uint32_t lanes = std::min(32u, l.threads - w * 32);
      warp.exists = warp.ready = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
      warp.done = 0;
      for (Meeting& m : warp.meetings) m.mask = m.arrived = 0;
    }
    for (uint32_t i = 0; i < l.threads; ++i) start(b->fibers[i].get());
  }
  c->warp = l.config.schedule == kReverse ? uint32_t(c->warps.size()) - 1 : 0;
  c->lane = 31;
  enter_fibers(c, pick(c));
}

static void check(const Launch& l) {
  const auto refuse = [&](const std::string& why) { throw Error(std::string(l.name) + ": invalid launch: " + why); };
  const uint64_t limits[] = {0x7fffffff, 65535, 65535};
  const unsigned grid[] = {l.grid.x, l.grid.y, l.grid.z}, cluster[] = {l.cluster.x, l.cluster.y, l.cluster.z};
  for (int i = 0; i < 3; ++i) {
    if (grid[i] == 0 || grid[i] > limits[i]) refuse("grid dimension of " + std::to_string(grid[i]) + " blocks");
    if (cluster[i] == 0 || grid[i] % cluster[i]) refuse("the grid is no multiple of the cluster");
  }
  if (l.threads == 0 || l.threads > 1024) refuse("blocks of " + std::to_string(l.threads) + " threads");
  if (l.blocks_per_cluster > 8) refuse("clusters of " + std::to_string(l.blocks_per_cluster) + " blocks");
  const size_t limit = shared_limit(l.kernel, false);
  if (l.shared > limit)
    refuse(std::to_string(l.shared) + " bytes of shared memory; allowed are " + std::to_string(limit) +
           " (allow_shared raises it up to " + std::to_string(kMaxShared) + ")");
}

void launch(const char* name, const void* kernel, dim3 grid, dim3 block, dim3 cluster, size_t shared,
            void (*body)(void*), void* context) {
  if (self) throw Error(std::string(name) + ": a kernel launches a kernel");
  Launch l{name,
           kernel,
           grid,
           block,
           cluster,
           shared,
           body,
           context,
           config(),
           block.x * block.y * block.z,
           cluster.x * cluster.y * cluster.z};
  check(l);
  const uint64_t clusters = uint64_t(grid.x) * grid.y * grid.z / l.blocks_per_cluster;
  std::atomic<uint64_t> next{0};
  std::atomic<bool> stop{false};
  std::string error;
  std::mutex error_mutex;
  const CatchWildAccesses catching;
  auto work = [&] {
    happens_before(&l.start);  // what made this OS thread and its thread-local memory precedes its fibers
    const SignalStack signal_stack;
    std::unique_ptr<Cluster> c;
    {
      const Quiet quiet;
      c = take();
      shape(c.get(), &l);
    }
    for (uint64_t i; !stop && (i = next++) < clusters;) {
      const Quiet quiet;
      run(c.get(), l.config.schedule == kReverse ? clusters - 1 - i : i);
      if (c->error.empty()) continue;
      stop = true;
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (error.empty()) error = c->error;
    }
    const Quiet quiet;
    give_back(std::move(c));
  };
  std::vector<std::thread> others;
  const uint64_t workers = std::min<uint64_t>(clusters, uint64_t(std::max(1, l.config.workers)));
  for (uint64_t i = 1; i < workers; ++i) others.emplace_back(work);
  work();
  for (auto& t : others) t.join();
  happens_after(&l.end);
  if (!error.empty()) throw Error(error);
}

}  // namespace simt
