// Collectives of a warp: lanes park in a meeting, the last to arrive computes for all. A meeting that cannot complete,
// because its mask names lanes that left or that stand at another collective, is reported where it happens; lanes that
// never come end in the scheduler's report.
#include <cstring>

#include "runtime.h"

namespace simt {

bool meet(uint32_t mask, void* argument, const Place& place, Meeting** out) {
  Fiber* f = current();
  Warp& w = warp_of(f);
  const uint32_t bit = 1u << f->lane;
  if (!(mask & bit))
    fail("%s at %s:%d: the calling lane is not in its own mask %08x", place.what, place.file, place.line, mask);
  mask &= w.exists;
  if (mask & w.done)
    fail("%s at %s:%d: mask %08x names lanes that have exited (%08x)", place.what, place.file, place.line, mask,
         mask & w.done);
  Meeting *found = nullptr, *empty = nullptr;
  for (Meeting& m : w.meetings) {
    if (!m.arrived) {
      if (!empty) empty = &m;
      continue;
    }
    if (m.mask == mask) found = &m;  // overlapping masks are legal: lanes may be ahead of others
  }
  if (!found) {
    found = empty;
    found->mask = mask;
    found->place = place;
  } else if (std::strcmp(found->place.what, place.what) != 0) {
    fail("diverged warp: %s at %s:%d, while lanes %08x wait in %s at %s:%d", place.what, place.file, place.line,
         found->arrived, found->place.what, found->place.file, found->place.line);
  }
  found->slot[f->lane] = argument;
  found->arrived |= bit;
  *out = found;
  if (found->arrived == mask) return true;
  park(place);
  return false;
}

void release(Meeting* m) {
  Fiber* f = current();
  for (uint32_t rest = m->mask & ~(1u << f->lane); rest; rest &= rest - 1)
    wake(f->block->fibers[f->warp * 32 + uint32_t(__builtin_ctz(rest))].get());
  m->arrived = m->mask = 0;
  maybe_yield();
}

template <class F>
static void each(uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

namespace {
struct Word {
  uint64_t in, out;
  Shuffle how;
  int argument, width;
};
}  // namespace

// A lane whose source falls outside its segment of `width` lanes keeps its own value, as PTX says.
static int source_lane(int lane, const Word& w) {
  const int first = lane & ~(w.width - 1), end = first + w.width;
  switch (w.how) {
    case Shuffle::index:
      return first + (w.argument & (w.width - 1));
    case Shuffle::exclusive_or:
      return (lane ^ w.argument) < end ? lane ^ w.argument : lane;
    case Shuffle::down:
      return lane + w.argument < end ? lane + w.argument : lane;
    default:
      return lane - w.argument >= first ? lane - w.argument : lane;
  }
}

uint64_t shuffle(uint32_t mask, uint64_t value, Shuffle how, int argument, int width, const char* file, int line) {
  const Quiet quiet;
  if (width < 1 || width > 32 || width & (width - 1))
    fail("shuffle at %s:%d: width %d is no power of two up to 32", file, line, width);
  Word word{value, 0, how, argument, width};
  Meeting* m;
  if (meet(mask, &word, {"shuffle", file, "", line}, &m)) {
    each(m->mask, [&](int lane) {
      auto* w = static_cast<Word*>(m->slot[lane]);
      const int from = source_lane(lane, *w);
      if (!(m->mask >> from & 1))
        fail("shuffle at %s:%d: lane %d reads lane %d, which is not in mask %08x", file, line, lane, from, m->mask);
      w->out = static_cast<Word*>(m->slot[from])->in;
    });
    release(m);
  }
  return word.out;
}

uint32_t ballot(uint32_t mask, bool predicate, const char* file, int line) {
  const Quiet quiet;
  struct Vote {
    bool in;
    uint32_t out;
  } vote{predicate, 0};
  Meeting* m;
  if (meet(mask, &vote, {"vote", file, "", line}, &m)) {
    uint32_t result = 0;
    each(m->mask, [&](int lane) { result |= uint32_t(static_cast<Vote*>(m->slot[lane])->in) << lane; });
    each(m->mask, [&](int lane) { static_cast<Vote*>(m->slot[lane])->out = result; });
    release(m);
  }
  return vote.out;
}

uint32_t match(uint32_t mask, uint64_t value, bool all, const char* file, int line) {
  const Quiet quiet;
  struct Match {
    uint64_t in;
    uint32_t out;
  } mine{value, 0};
  Meeting* m;
  if (meet(mask, &mine, {"match", file, "", line}, &m)) {
    each(m->mask, [&](int lane) {
      auto* a = static_cast<Match*>(m->slot[lane]);
      each(m->mask, [&](int other) { a->out |= uint32_t(static_cast<Match*>(m->slot[other])->in == a->in) << other; });
      if (all && a->out != m->mask) a->out = 0;
    });
    release(m);
  }
  return mine.out;
}

int64_t fold(uint32_t mask, int64_t value, Fold how, const char* file, int line) {
  const Quiet quiet;
  struct Number {
    int64_t in, out;
  } mine{value, 0};
  Meeting* m;
  if (meet(mask, &mine, {"reduce", file, "", line}, &m)) {
    int64_t total = 0;
    bool first = true;
    each(m->mask, [&](int lane) {
      const int64_t x = static_cast<Number*>(m->slot[lane])->in;
      if (first)
        total = x;
      else if (how == Fold::add)
        total += x;
      else if (how == Fold::min)
        total = x < total ? x : total;
      else if (how == Fold::max)
        total = x > total ? x : total;
      else if (how == Fold::bit_and)
        total &= x;
      else if (how == Fold::bit_or)
        total |= x;
      else
        total ^= x;
      first = false;
    });
    each(m->mask, [&](int lane) { static_cast<Number*>(m->slot[lane])->out = total; });
    release(m);
  }
  return mine.out;
}

void sync_warp(uint32_t mask, const char* file, int line) {
  Warp& w = warp_of(current());
  happens_before(&w.sync);
  {
    const Quiet quiet;
    Meeting* m;
    if (meet(mask, nullptr, {"__syncwarp", file, "", line}, &m)) release(m);
  }
  happens_after(&w.sync);
}

}  // namespace simt
