// Who runs next. In order: warp by warp, lane by lane, each as far as it gets, asynchronous work as late as possible.
// Reverse: the same from the other end. Random: warps have priorities that change now and then, so that one runs far
// ahead of another, lanes take turns at random, and asynchronous work lands at any time; all by the seed.
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>

#include "runtime.h"

namespace simt {

thread_local Thread* self = nullptr;

uint64_t Cluster::random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state >> 11;
}

void Cluster::land(std::function<void()> work) {
  if (late())
    pending.push_back(std::move(work));
  else
    work();
}

static void land_one(Cluster* c, size_t i) {
  auto work = std::move(c->pending[i]);
  c->pending.erase(c->pending.begin() + long(i));
  work();
}

static int pick_lane(Cluster* c, const Warp& w, bool same) {
  const int schedule = c->launch->config.schedule;
  if (schedule == kReverse) return 31 - __builtin_clz(w.ready);
  if (schedule == kRandom) {
    const unsigned by = unsigned(c->random() % 32);
    const uint32_t turned = w.ready >> by | (by ? w.ready << (32 - by) : 0);
    return int((unsigned(__builtin_ctz(turned)) + by) % 32);
  }
  const uint32_t later = same && c->lane < 31 ? w.ready & ~((2u << c->lane) - 1) : 0;
  return __builtin_ctz(later ? later : w.ready);
}

static int pick_warp(Cluster* c) {
  const uint32_t n = uint32_t(c->warps.size());
  const int schedule = c->launch->config.schedule;
  if (schedule == kRandom) {
    if (c->random() % 16 == 0) c->warps[c->random() % n].priority = uint32_t(c->random() % 65536);
    if (c->random() % 64 == 0 && c->warps[c->warp].ready) return int(c->warp);
    int best = -1;
    for (uint32_t w = 0; w < n; ++w)
      if (c->warps[w].ready && (best < 0 || c->warps[w].priority > c->warps[uint32_t(best)].priority)) best = int(w);
    return best;
  }
  const uint32_t step = schedule == kReverse ? n - 1 : 1;
  for (uint32_t i = 0, w = c->warp; i < n; ++i, w = (w + step) % n)
    if (c->warps[w].ready) return int(w);
  return -1;
}

Fiber* pick(Cluster* c) {
  if (c->launch->config.schedule == kRandom && !c->pending.empty() && c->random() % 16 == 0)
    land_one(c, c->random() % c->pending.size());
  const int w = pick_warp(c);
  if (w < 0) return nullptr;
  const uint32_t lane = uint32_t(pick_lane(c, c->warps[uint32_t(w)], uint32_t(w) == c->warp));
  c->warp = uint32_t(w), c->lane = lane;
  const uint32_t per_block = (c->launch->threads + 31) / 32;
  return c->blocks[uint32_t(w) / per_block]->fibers[uint32_t(w) % per_block * 32 + lane].get();
}

static const char* base_name(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash ? slash + 1 : file;
}

std::string who_waits(Cluster* c) {
  std::map<std::string, std::pair<int, Fiber*>> groups;
  for (auto& b : c->blocks)
    for (uint32_t i = 0; i < c->launch->threads; ++i) {
      Fiber* f = b->fibers[i].get();
      char text[256] = "exited";
      if (f->state != State::done)
        std::snprintf(text, sizeof text, "wait in %s at %s:%d", f->place.what, base_name(f->place.file), f->place.line);
      groups.emplace(text, std::make_pair(0, f)).first->second.first++;
    }
  std::string out;
  for (auto& [text, group] : groups) {
    const Fiber* f = group.second;
    out += "\n    " + std::to_string(group.first) + " threads (first: " + std::to_string(f->linear);
    if (c->blocks.size() > 1) out += " of block " + std::to_string(f->block->rank) + " in the cluster";
    out += ") " + text;
  }
  return out;
}

void fail(const char* format, ...) {
  char text[2048];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (!self) throw Error(text);
  const Quiet quiet;
  Fiber* f = current();
  char head[256];
  std::snprintf(head, sizeof head, "%s, block (%u,%u,%u), thread %u (warp %u, lane %u): ", cluster()->launch->name,
                f->ids->index.x, f->ids->index.y, f->ids->index.z, f->linear, f->warp, f->lane);
  cluster()->error = std::string(head) + text;
  leave_fibers();
}

// The next fiber, landing asynchronous work while nobody can run; null when all threads are done.
static Fiber* next(Cluster* c) {
  const Quiet quiet;
  for (;;) {
    if (Fiber* f = pick(c)) return f;
    if (c->alive == 0 && !c->pending.empty())
      fail("the threads exit with %zu bulk loads in flight that nobody waited for", c->pending.size());
    if (!c->pending.empty())
      land_one(c, 0);
    else if (c->alive == 0)
      return nullptr;
    else
      fail("deadlock, no thread can run:%s", who_waits(c).c_str());
  }
}

void park(const Place& place) {
  const Quiet quiet;
  Fiber* f = current();
  f->state = State::waiting;
  f->place = place;
  warp_of(f).ready &= ~(1u << f->lane);
  Fiber* to = next(f->block->cluster);
  if (to != f) switch_fibers(f, to);
}

void wake(Fiber* f) {
  f->state = State::ready;
  warp_of(f).ready |= 1u << f->lane;
}

void maybe_yield() {
  const Quiet quiet;
  Cluster* c = cluster();
  if (c->launch->config.schedule != kRandom || c->random() % 4) return;
  Fiber *from = current(), *to = pick(c);
  if (to != from) switch_fibers(from, to);
}

void thread_main() {
  Cluster* c = cluster();
  happens_after(&c->launch->start);
  c->launch->body(c->launch->context);
  Fiber* f = current();
  happens_before(&c->launch->end);
  {
    const Quiet quiet;
    check_copies(f);
    check_stores(f);
    check_products(f);
    f->state = State::done;
    Warp& w = warp_of(f);
    w.ready &= ~(1u << f->lane);
    w.done |= 1u << f->lane;
    f->block->alive--;
    c->alive--;
    leave_barriers(f);
  }
  Fiber* to = next(c);
  if (!to) {
    for (auto& b : c->blocks) {
      check_slack(b.get());
      check_warpgroups(b.get());
    }
    leave_fibers();
  }
  switch_fibers(f, to);
  __builtin_unreachable();
}

}  // namespace simt
