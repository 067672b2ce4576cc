// cp.async: the target is poisoned at issue, the copy lands at the wait of the thread that issued it (or at once).
#include <cstring>

#include "runtime.h"
#include "simt_ptx.h"

namespace simt {

static void land(const Copy& c) {
  if (c.given) std::memcpy(c.to, c.from, c.given);
  std::memset(c.to + c.given, 0, c.bytes - c.given);
}

void copy_async(uint32_t to, const void* from, uint32_t bytes, uint32_t given) {
  if (to / kWindow) fail("cp.async writes the block's own shared memory only");
  unsigned char* at = shared_at(to, bytes, bytes, "cp.async");
  if (given > bytes) fail("cp.async: %u of %u bytes", given, bytes);
  if (given && uintptr_t(from) % bytes) fail("cp.async: source %p is not aligned to %u bytes", from, bytes);
  note_write(at, bytes);
  note_read(from, given);
  const Quiet quiet;
  const Copy copy{at, from, bytes, given};
  if (!cluster()->late()) return land(copy);
  poison(at, bytes);
  current()->copies.push_back(copy);
}

void copy_commit() {
  const Quiet quiet;
  Fiber* f = current();
  f->copy_groups.push_back(f->copies.size());
}

void copy_wait(uint32_t newest) {
  const Quiet quiet;
  Fiber* f = current();
  if (f->copy_groups.size() <= newest) return;
  const size_t groups = f->copy_groups.size() - newest, end = f->copy_groups[groups - 1];
  for (size_t i = 0; i < end; ++i) land(f->copies[i]);
  f->copies.erase(f->copies.begin(), f->copies.begin() + long(end));
  f->copy_groups.erase(f->copy_groups.begin(), f->copy_groups.begin() + long(groups));
  for (size_t& g : f->copy_groups) g -= end;
}

void check_copies(Fiber* f) {
  if (!f->copies.empty())
    fail("the thread exits with %zu cp.async in flight (no commit, or no wait after it)", f->copies.size());
}

}  // namespace simt
