// Barriers of a block (the sixteen named ones; __syncthreads is number 0) and of a cluster.
#include <cstdio>
#include <cstdlib>

#include "runtime.h"
#include "simt_ptx.h"

namespace simt {

// With SIMT_UNORDERED in the environment, barriers of a block hold threads up but order nothing for the thread
// sanitizer: a kernel that needs its barriers then has races, and a check that reports none has gone blind.
static bool unordered() {
  static const bool asked = std::getenv("SIMT_UNORDERED") != nullptr;
  return asked;
}
static void release_barrier(Barrier& b) {
  if (!unordered()) return happens_before(&b.sync);
  static const int said = std::fprintf(stderr, "a barrier that orders nothing\n");
  (void)said;
}
static void acquire_barrier(Barrier& b) {
  if (!unordered()) happens_after(&b.sync);
}

static bool arrive(Barrier& b, int id, uint32_t expected, int vote, const Place& place) {
  if (b.count == 0) b.expected = expected, b.first = place;
  if (b.expected != expected)
    fail("barrier %d at %s:%d expects %u threads, but the arrival at %s:%d expected %u", id, place.file, place.line,
         expected, b.first.file, b.first.line, b.expected);
  if (id == 0 && b.first.line != place.line)
    fail("divergent barrier: __syncthreads at %s:%d, while others wait at %s:%d", place.file, place.line, b.first.file,
         b.first.line);
  b.votes += vote;
  return ++b.count == b.expected;
}

static void complete(Barrier& b) {
  for (Fiber* f : b.waiting) {
    f->votes = b.votes;
    wake(f);
  }
  b.waiting.clear();
  b.count = 0, b.votes = 0;
}

static int wait_for_all(int id, uint32_t expected, int vote, const Place& place) {
  Fiber* f = current();
  Barrier& b = f->block->barriers[id];
  release_barrier(b);
  {
    const Quiet quiet;
    if (arrive(b, id, expected, vote, place)) {
      f->votes = b.votes;
      const int votes = b.votes;
      complete(b);
      maybe_yield();
      f->votes = votes;
    } else {
      b.waiting.push_back(f);
      park(place);
    }
  }
  acquire_barrier(b);
  return f->votes;
}

int sync_block(int vote, const char* file, int line) {
  return wait_for_all(0, cluster()->launch->threads, vote, {"__syncthreads", file, "", line});
}

static void check_named(int id, int threads, const char* what, const char* file, int line) {
  if (id < 1 || id > 15) fail("%s at %s:%d: barrier %d; 1 to 15 are free (0 is __syncthreads)", what, file, line, id);
  if (threads <= 0 || threads % 32 || uint32_t(threads) > (cluster()->launch->threads + 31) / 32 * 32)
    fail("%s at %s:%d: %d threads are no number of whole warps of this block", what, file, line, threads);
}

void named_sync(int id, int threads, const char* file, int line) {
  check_named(id, threads, "bar.sync", file, line);
  wait_for_all(id, uint32_t(threads), 0, {"bar.sync", file, "", line});
}

void named_arrive(int id, int threads, const char* file, int line) {
  check_named(id, threads, "bar.arrive", file, line);
  Barrier& b = current()->block->barriers[id];
  release_barrier(b);
  const Quiet quiet;
  if (arrive(b, id, uint32_t(threads), 0, {"bar.arrive", file, "", line})) complete(b);
  maybe_yield();
}

// The barrier of a cluster has two halves; a phase ends when every thread that has not exited has arrived.
static void maybe_end_phase(Cluster* c) {
  if (c->arrived < c->alive || c->arrived == 0) return;
  c->arrived = 0;
  c->phase++;
  for (Fiber* f : c->cluster_waiters) wake(f);
  c->cluster_waiters.clear();
}

void cluster_arrive(const char* file, int line) {
  Fiber* f = current();
  Cluster* c = cluster();
  if (f->cluster_arrived)
    fail("barrier.cluster.arrive at %s:%d: this thread arrived already and has not waited", file, line);
  happens_before(&c->sync);
  const Quiet quiet;
  f->cluster_arrived = true;
  f->cluster_phase = c->phase;
  c->arrived++;
  maybe_end_phase(c);
  maybe_yield();
}

void cluster_wait(const char* file, int line) {
  Fiber* f = current();
  Cluster* c = cluster();
  if (!f->cluster_arrived) fail("barrier.cluster.wait at %s:%d: this thread has not arrived", file, line);
  {
    const Quiet quiet;
    while (f->cluster_phase == c->phase) {
      c->cluster_waiters.push_back(f);
      park({"barrier.cluster.wait", file, "", line});
    }
    f->cluster_arrived = false;
  }
  happens_after(&c->sync);
}

void leave_barriers(Fiber* f) {
  Cluster* c = f->block->cluster;
  if (f->cluster_arrived && f->cluster_phase == c->phase) c->arrived--;  // it no longer counts on either side
  maybe_end_phase(c);
}

}  // namespace simt
