// wgmma: D [64, N] (+)= A [64, 16] B [16, N] by a warpgroup of four warps; warp w computes rows 16 w to 16 w + 15.
//
// Operands in shared memory are read, through the async proxy's view, as late as the wait allows; the accumulator's
// registers are poisoned from issue to wait. Operands that are 16-byte runs along K ("K-major") or along M or N
// ("MN-major") lie as the matrix descriptor says: LBO and SBO are its two strides, and XOR of address bits 4-6 with
// bits 7-9 (or fewer of both) is its swizzle.
#include <cstring>

#include "runtime.h"
#include "simt_ptx.h"

namespace simt {

namespace {
struct Descriptor {
  uint32_t start, lbo, sbo, row;  // bytes; row: 128, 64 or 32 by the swizzle, 16 without one
  explicit Descriptor(uint64_t d)
      : start(uint32_t(d & 0x3fff) << 4), lbo(uint32_t(d >> 16 & 0x3fff) << 4), sbo(uint32_t(d >> 32 & 0x3fff) << 4) {
    constexpr uint32_t rows[] = {16, 128, 64, 32};
    row = rows[d >> 62];
  }
  uint32_t swizzled(uint32_t at) const { return row == 16 ? at : at ^ (at >> 7 & (row / 16 - 1)) << 4; }
  // The run of eight elements from (mn, 8 half): core matrices of 8 rows of `row` bytes, SBO apart; without a swizzle
  // the two halves of K are LBO apart.
  uint32_t k_major(uint32_t mn, uint32_t half) const {
    return swizzled(start + mn / 8 * sbo + mn % 8 * row + half * (row == 16 ? lbo : 16));
  }
  // The run of eight elements from (8 chunk, k): rows of `row` bytes along M or N, LBO apart; eight k one after
  // another, then SBO. Without a swizzle the two strides change places.
  uint32_t mn_major(uint32_t chunk, uint32_t k) const {
    if (row == 16) return start + chunk * sbo + k % 8 * 16 + k / 8 * lbo;
    const uint32_t chunks = row / 16;
    return swizzled(start + chunk / chunks * lbo + chunk % chunks * 16 + k % 8 * row + k / 8 * sbo);
  }
};
}  // namespace

static void check_descriptor(uint64_t d, const char* which) {
  const Descriptor v(d);
  if (d >> 49 & 7) fail("wgmma: %s has a base offset, which the bench does not model", which);
  if (v.row > 16 && v.start & (v.row * 8 - 1) & ~127u)
    fail("wgmma: %s starts at %u, off the %u-byte repeat of its swizzle", which, v.start, v.row * 8);
}

// Rows first to first + rows of an operand, as 16-byte runs: f(run's address, mn, k, whether it runs along mn).
template <class F>
static void each_run(const Descriptor& d, bool mn_major, uint32_t first, uint32_t rows, F f) {
  if (mn_major)
    for (uint32_t k = 0; k < 16; ++k)
      for (uint32_t mn = first; mn < first + rows; mn += 8) f(d.mn_major(mn / 8, k), mn - first, k);
  else
    for (uint32_t mn = first; mn < first + rows; ++mn)
      for (uint32_t half = 0; half < 2; ++half) f(d.k_major(mn, half), mn - first, 8 * half);
}

static float value(uint16_t h, bool bf16) {
  return bf16 ? bf16_to_float(h) : half_to_float(h);
}

static void read_operand(uint64_t d, bool mn_major, bool bf16, uint32_t first, uint32_t rows, float (*out)[16]) {
  each_run(Descriptor(d), mn_major, first, rows, [&](uint32_t at, uint32_t mn, uint32_t k) {
    uint16_t run[8];
    std::memcpy(run, async_at(at, 16, 16, "wgmma operand"), 16);
    for (uint32_t i = 0; i < 8; ++i) (mn_major ? out[mn + i][k] : out[mn][k + i]) = value(run[i], bf16);
  });
}

static float* accumulator(Fiber* f, float* d) {
  for (Accumulator& a : f->accumulators)
    if (a.d == d) return a.value.data();
  return d;
}

// One product of the calling warp's sixteen rows. lanes[l]: what lane l issued.
static void compute(Fiber* const* fibers, Product* const* lanes) {
  const Product& p = *lanes[0];
  static thread_local float A[16][16], B[256][16];
  if (!p.a_in_registers)
    read_operand(p.a, p.a_mn_major, p.bf16, fibers[0]->warp % 4 * 16, 16, A);
  else
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int h = 0; h < 2; ++h)
          A[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + h] =
              value(uint16_t(lanes[lane]->fragment[i] >> 16 * h), p.bf16);
  read_operand(p.b, p.b_mn_major, p.bf16, 0, p.n, B);
  for (int lane = 0; lane < 32; ++lane) {
    float* d = accumulator(fibers[lane], lanes[lane]->d);
    for (uint32_t j = 0; j < p.n / 2; ++j) {
      const float* a = A[lane / 4 + (j >> 1 & 1) * 8];
      const float* b = B[j / 4 * 8 + uint32_t(lane % 4) * 2 + (j & 1)];
      float sum = p.accumulate ? d[j] : 0.f;
      for (int k = 0; k < 16; ++k) sum += a[k] * b[k];
      d[j] = sum;
    }
  }
}

static void warp_fibers(Fiber* f, Fiber** out) {
  for (uint32_t l = 0; l < 32; ++l) out[l] = f->block->fibers[f->warp * 32 + l].get();
}

void wgmma_fence() {
  current()->fenced = true;
}

void wgmma_commit() {
  current()->product_group++;
}

static void note_operands([[maybe_unused]] const Product& p) {
#if defined(SIMT_TSAN)
  const Fiber* f = current();
  uint32_t i = 0;  // the lanes share the reads of their warp
  const auto note = [&](uint32_t at, uint32_t, uint32_t) {
    if (i++ % 32 == f->lane) note_read(shared_at(at, 16, 16, "wgmma operand"), 16);
  };
  if (!p.a_in_registers) each_run(Descriptor(p.a), p.a_mn_major, f->warp % 4 * 16, 16, note);
  each_run(Descriptor(p.b), p.b_mn_major, 0, p.n, note);
#endif
}

void wgmma(float* d, uint32_t n, bool bf16, const uint32_t* fragment, uint64_t a, uint64_t b, int accumulate,
           bool a_mn_major, bool b_mn_major, const char* file, int line) {
  Fiber* f = current();
  Product p{n, f->product_group, bf16, fragment != nullptr, a_mn_major, b_mn_major, accumulate != 0, a, b, {}, d};
  if (fragment) std::memcpy(p.fragment, fragment, sizeof p.fragment);
  if (!f->fenced)
    fail("wgmma at %s:%d: no wgmma_fence since its registers were last touched (start or wait)", file, line);
  if ((f->warp / 4 + 1) * 128 > cluster()->launch->threads)
    fail("wgmma at %s:%d: not by a whole warpgroup", file, line);
  if (!fragment) check_descriptor(a, "A");
  check_descriptor(b, "B");
  note_operands(p);
  const Quiet quiet;
  Meeting* m;
  if (!meet(0xffffffffu, &p, {"wgmma", file, "", line}, &m)) return;
  Fiber* fibers[32];
  Product* lanes[32];
  warp_fibers(f, fibers);
  for (int l = 0; l < 32; ++l) {
    lanes[l] = static_cast<Product*>(m->slot[l]);
    const Product &x = *lanes[l], &y = *lanes[0];
    if (x.a != y.a || x.b != y.b || x.n != y.n || x.accumulate != y.accumulate || x.group != y.group)
      fail("wgmma at %s:%d: the lanes of the warp disagree on descriptors, shape or group", file, line);
    fibers[l]->products_issued++;
  }
  if (!cluster()->late()) compute(fibers, lanes);
  for (int l = 0; l < 32 && cluster()->late(); ++l) {
    Product& q = *lanes[l];
    if (accumulator(fibers[l], q.d) == q.d) {
      fibers[l]->accumulators.push_back({q.d, n / 2, std::vector<float>(q.d, q.d + n / 2)});
      poison(q.d, n / 2 * sizeof(float));
    }
    fibers[l]->products.push_back(q);
  }
  release(m);
}

// Writes back accumulators that no product in flight uses any more.
static void settle(Fiber* f) {
  for (size_t i = 0; i < f->accumulators.size();) {
    Accumulator& a = f->accumulators[i];
    bool busy = false;
    for (const Product& p : f->products) busy = busy || p.d == a.d;
    if (busy) {
      ++i;
      continue;
    }
    std::memcpy(a.d, a.value.data(), a.count * sizeof(float));
    f->accumulators.erase(f->accumulators.begin() + long(i));
  }
}

void wgmma_wait(uint32_t newest, const char* file, int line) {
  Fiber* f = current();
  char* sync = &warp_of(f).sync;
  happens_before(sync);  // the reads of the operands are over for the whole warp
  {
    const Quiet quiet;
    f->fenced = false;
    Meeting* m;
    if (meet(0xffffffffu, nullptr, {"wgmma.wait_group", file, "", line}, &m)) {
      Fiber* fibers[32];
      warp_fibers(f, fibers);
      std::vector<Product>& first = fibers[0]->products;
      size_t n = 0;
      while (n < first.size() && first[n].group + newest < f->product_group) ++n;
      for (size_t i = 0; i < n; ++i) {
        Product* lanes[32];
        for (int l = 0; l < 32; ++l) lanes[l] = &fibers[l]->products[i];
        compute(fibers, lanes);
      }
      for (Fiber* x : fibers) {
        x->products.erase(x->products.begin(), x->products.begin() + long(n));
        settle(x);
      }
      release(m);
    }
  }
  happens_after(sync);
}

void check_products(Fiber* f) {
  if (!f->products.empty())
    fail("the thread exits with %zu wgmma in flight (no commit, or no wait after it)", f->products.size());
}

void check_warpgroups(Block* b) {
  const uint32_t threads = b->cluster->launch->threads;
  for (uint32_t i = 0; i + 128 <= threads; i += 128)
    for (uint32_t w = 1; w < 4; ++w)
      if (b->fibers[i]->products_issued != b->fibers[i + w * 32]->products_issued)
        fail("wgmma: warps %u and %u of one warpgroup issued %u and %u products", i / 32, i / 32 + w,
             b->fibers[i]->products_issued, b->fibers[i + w * 32]->products_issued);
}

}  // namespace simt
