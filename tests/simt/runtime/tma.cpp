// Bulk copies and tensor maps. A load poisons its target at issue and lands late, then tells its mbarrier; a store
// reads its source as late as its thread's wait allows. Both go through the async proxy's view of shared memory.
#include <cstring>

#include "cuda.h"
#include "runtime.h"
#include "simt_ptx.h"

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                const cuuint64_t* size, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  *map = {};
  map->base = static_cast<unsigned char*>(base);
  map->rank = rank;
  map->element = type == CU_TENSOR_MAP_DATA_TYPE_UINT8                                                 ? 1
                 : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2
                                                                                                       : 4;
  map->swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16u << swizzle;
  if (rank < 1 || rank > 5 || uintptr_t(base) % 16) return CUDA_ERROR_INVALID_VALUE;
  map->stride[0] = map->element;
  for (uint32_t i = 0; i < rank; ++i) {
    map->size[i] = size[i], map->box[i] = box[i];
    if (size[i] == 0 || size[i] > uint64_t(1) << 32 || box[i] == 0 || box[i] > 256 || element_strides[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    if (i == 0) continue;
    map->stride[i] = strides[i - 1];
    if (strides[i - 1] % 16 || strides[i - 1] >= uint64_t(1) << 40) return CUDA_ERROR_INVALID_VALUE;
  }
  const uint32_t inner = box[0] * map->element;
  // The driver takes an inner box narrower than the swizzle too; how such rows lie the bench does not claim to know.
  const bool fits = inner % 16 == 0 && (map->swizzle == 0 || inner == map->swizzle);
  return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

namespace simt {

static void check_bulk(const void* global, uint32_t bytes, const char* what) {
  if (bytes == 0 || bytes % 16 || uintptr_t(global) % 16)
    fail("%s: size %u or address %p is no multiple of 16", what, bytes, global);
}

static void check_alive(const Block* b, const char* what) {
  if (b->alive == 0) fail("%s: its block has exited", what);
}

// Both views of `bytes` of shared memory.
struct Target {
  Block* block;
  unsigned char *base, *async;
  void write(uint32_t at, const void* from, uint32_t bytes) const {
    for (unsigned char* view : {base, async}) {
      if (from)
        std::memcpy(view + at, from, bytes);
      else
        std::memset(view + at, 0, bytes);
    }
  }
  void poison_all(uint32_t bytes) const {
    poison(base, bytes);
    poison(async, bytes);
  }
};
static Target target(uint32_t address, uint32_t bytes, uint32_t align, const char* what) {
  return {block_at(address), shared_at(address, bytes, align, what), async_at(address, bytes, align, what)};
}

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier) {
  check_bulk(from, bytes, "cp.async.bulk");
  const Target t = target(to, bytes, 16, "cp.async.bulk");
  unsigned char* bar = mbarrier_at(mbarrier);
  note_read(from, bytes);
  note_write(t.base, bytes);
  happens_before(bar);
  const Quiet quiet;
  t.poison_all(bytes);
  cluster()->land([=] {
    check_alive(t.block, "cp.async.bulk");
    t.write(0, from, bytes);
    mbarrier_complete_tx(bar, bytes);
  });
}

void bulk_to_cluster(uint32_t to, uint32_t from, uint32_t bytes, uint32_t mbarrier) {
  check_bulk(nullptr, bytes, "cp.async.bulk to the cluster");
  const Target t = target(to, bytes, 16, "cp.async.bulk to the cluster"),
               source = target(from, bytes, 16, "cp.async.bulk to the cluster");
  if (block_at(mbarrier) != t.block)
    fail("cp.async.bulk to the cluster: the mbarrier must lie in the block that is written");
  unsigned char* bar = mbarrier_at(mbarrier);
  note_read(source.base, bytes);
  note_write(t.base, bytes);
  happens_before(bar);
  const Quiet quiet;
  t.poison_all(bytes);
  cluster()->land([=] {
    check_alive(t.block, "cp.async.bulk to the cluster");
    check_alive(source.block, "cp.async.bulk to the cluster");
    t.write(0, source.async, bytes);
    mbarrier_complete_tx(bar, bytes);
  });
}

// Calls f(shared address, global address or null outside the tensor, bytes) for each run of 16 bytes of a tile.
template <class F>
static void each_chunk(const CUtensorMap& m, const int* at, uint32_t address, F f) {
  const uint32_t inner = m.box[0] * m.element;
  uint32_t rows = 1;
  for (uint32_t i = 1; i < m.rank; ++i) rows *= m.box[i];
  for (uint32_t row = 0; row < rows; ++row) {
    const unsigned char* line = m.base;
    bool inside = true;
    for (uint32_t i = 1, rest = row; i < m.rank; rest /= m.box[i], ++i) {
      const int64_t x = int64_t(at[i]) + rest % m.box[i];
      inside = inside && x >= 0 && uint64_t(x) < m.size[i];
      line += x * int64_t(m.stride[i]);
    }
    for (uint32_t byte = 0; byte < inner; byte += m.element) {
      const int64_t x = int64_t(at[0]) + byte / m.element;
      const bool here = inside && x >= 0 && uint64_t(x) < m.size[0];
      uint32_t a = address + row * inner + byte;
      if (m.swizzle) a ^= (a >> 7 & (m.swizzle / 16 - 1)) << 4;  // bits 4-6 by bits 7-9, or fewer of both
      f(a, here ? const_cast<unsigned char*>(line) + x * m.element : nullptr);
    }
  }
}

static uint32_t tile_bytes(const CUtensorMap& m, uint32_t rank, const char* what) {
  if (m.rank != rank) fail("%s: %u coordinates for a tensor of %u dimensions", what, rank, m.rank);
  uint32_t bytes = m.element;
  for (uint32_t i = 0; i < rank; ++i) bytes *= m.box[i];
  return bytes;
}

void tensor_load(uint32_t to, const CUtensorMap* map, const int* at, uint32_t rank, uint32_t mbarrier,
                 uint32_t blocks) {
  struct Coordinates {
    int at[4];
  } where{};
  std::memcpy(where.at, at, rank * sizeof(int));
  const CUtensorMap m = *map;
  const uint32_t bytes = tile_bytes(m, rank, "TMA load"), here = to % kWindow;
  if (blocks >> cluster_size())
    fail("TMA load: mask %04x names blocks outside a cluster of %u", blocks, cluster_size());
  for (uint32_t r = 0; r < cluster_size(); ++r) {
    if (blocks ? !(blocks >> r & 1) : r != 0) continue;
    const uint32_t a = blocks ? map_to_rank(to, r) : to, b = blocks ? map_to_rank(mbarrier, r) : mbarrier;
    const Target t = target(a, bytes, 128, "TMA load");
    unsigned char* bar = mbarrier_at(b);
    note_write(t.base, bytes);
    happens_before(bar);
    const Quiet quiet;
    t.poison_all(bytes);
    cluster()->land([=] {
      check_alive(t.block, "TMA load");
      each_chunk(m, where.at, here,
                 [&](uint32_t shared, const unsigned char* global) { t.write(shared - here, global, m.element); });
      mbarrier_complete_tx(bar, bytes);
    });
  }
}

static void store(std::function<void()> run) {
  Fiber* f = current();
  if (cluster()->late())
    f->stores.push_back({std::move(run), f->store_group});
  else
    run();
}

void bulk_store(void* to, uint32_t from, uint32_t bytes) {
  check_bulk(to, bytes, "cp.async.bulk store");
  const Target source = target(from, bytes, 16, "cp.async.bulk store");
  note_read(source.base, bytes);
  note_write(to, bytes);
  const Quiet quiet;
  store([=] { std::memcpy(to, source.async, bytes); });
}

void tensor_store(const CUtensorMap* map, const int* at, uint32_t rank, uint32_t from) {
  struct Coordinates {
    int at[4];
  } where{};
  std::memcpy(where.at, at, rank * sizeof(int));
  for (uint32_t i = 0; i < rank; ++i)  // seen on an H200, whatever the swizzle; a store may end beyond the tensor
    if (at[i] < 0) fail("TMA store to a negative coordinate, %d: an illegal instruction on a GPU", at[i]);
  const CUtensorMap m = *map;
  const uint32_t bytes = tile_bytes(m, rank, "TMA store");
  const Target source = target(from, bytes, 128, "TMA store");
  note_read(source.base, bytes);
  const Quiet quiet;
  store([=] {
    each_chunk(m, where.at, from, [&](uint32_t shared, unsigned char* global) {
      if (global) std::memcpy(global, source.async + (shared - from), m.element);
    });
  });
}

void bulk_commit() {
  current()->store_group++;
}

void bulk_wait(uint32_t newest) {
  const Quiet quiet;
  Fiber* f = current();
  while (!f->stores.empty() && f->stores.front().group + newest < f->store_group) {
    auto run = std::move(f->stores.front().run);
    f->stores.erase(f->stores.begin());
    run();
  }
}

void check_stores(Fiber* f) {
  if (!f->stores.empty())
    fail("the thread exits with %zu bulk stores in flight (no bulk_commit, or no bulk_wait after it)",
         f->stores.size());
}

}  // namespace simt
