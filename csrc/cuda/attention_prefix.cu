// attention_prefix:  what decoding queries see of a prefix that each B / M neighbours share, as partials
//
// partials f32 [B, H, chunks of the prefix or more, D + 2]   q [B, H, 1, D] bf16 or f16   k, v [M, H, P, D] of that
// dtype or e4m3 with scales   mask, lengths: the query is row P + lengths[b] - 1 of the mask
//
// A warp takes eight neighbours through one chunk (attention_decode.cuh): the fragments of keys and values that one
// query would ask for serve eight. Up to eight warps of a block take the same chunk, and find in L1 what the first of
// them asked for. A query's bits do not depend on who stands beside it, since rows and columns of mma do not mix.
//
// Bytes: k and v once for 64 neighbours from memory, eight times from L1, and D + 2 floats written for 128 slots and
// query: of n = 64 completions and P = 512, D = 64 in bf16 0.13 MB and 0.14 MB a head where the copies in 64 caches
// would be 8.4 MB.
//
// Refuses: as attention_decode.
#include <algorithm>

#include "attention_decode.cuh"

namespace igpt {
namespace cuda {

using namespace decode;

constexpr int kTogether = 8;     // queries of a warp
constexpr int kPrefixWarps = 8;  // of a block at most

template <int D, class E>
__global__ void __launch_bounds__(kPrefixWarps * 32)
    attention_prefix_kernel(float* partials,                    // [B, H, rows, D + 2]
                            int rows, Heads<const uint16_t> q,  // [B, H, 1, D]
                            DType dtype,                        // of q
                            Cache<E> cache,                     // [M, H, P, D], scales [M, H, pages]
                            Lengths lengths, Mask mask, int heads, int chunks, int neighbours, int blocks,
                            float scale2) {
  using Warp = Worker<D, E, kTogether>;
  STATIC_SMEM(uint64_t, sights, kPrefixWarps * kTogether * kTilesOfChunk);
  // Indices.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int of_chunk = int(blockIdx.x % blocks), chunk = int(blockIdx.x / blocks % chunks);
  const int mh = int(blockIdx.x / blocks / chunks), m = mh / heads, h = mh % heads, P = lengths.prefix;
  const int first = (of_chunk * int(blockDim.x / 32) + warp) * kTogether;  // of the warp's queries among the neighbours
  if (first >= neighbours) return;
  const auto image = [&](int i) { return m * neighbours + min(first + i, neighbours - 1); };

  // Who sees what of the chunk's tiles, [queries, tiles].
  uint64_t* const seen = sights + warp * kTogether * kTilesOfChunk;
  const auto clip = [&](int t) { return there(P - (chunk * kTilesOfChunk + t) * kTile); };
  if (lane < kTogether * kTilesOfChunk) seen[lane] = mask.row_start ? 0 : clip(lane % kTilesOfChunk);
  __syncwarp();
  for (int i = 0; i < kTogether && mask.row_start; ++i)
    mask.look(seen + i * kTilesOfChunk, P + lengths[image(i)] - 1, chunk * kTilesOfChunk, kTilesOfChunk, lane, 32,
              clip);
  __syncwarp();
  static_assert(kTilesOfChunk == 2);
  uint64_t anybody = 0, later = 0;  // of the first and the second tile
  for (int i = 0; i < kTogether; ++i) anybody |= seen[2 * i], later |= seen[2 * i + 1];

  // The chunk.
  Warp worker(q[image(lane / 4) * heads + h].row(0), dtype, scale2);
  float* record[2];
  for (int j = 0; j < 2; ++j) {
    const int i = 2 * (lane % 4) + j;
    record[j] = first + i < neighbours ? partials + (int64_t(image(i) * heads + h) * rows + chunk) * (D + 2) : nullptr;
    if (record[j] && lane < 4) record[j][D + 1] = 0.f;  // the only word that is read of what nobody sees
  }
  __syncwarp();
  worker.walk(
      cache, mh, chunk * kDecodeChunk, P, 0, 1,
      [&](unsigned& at) {
        for (; at < Warp::kSteps; ++at)
          if (Warp::bits_of(at < Warp::kStepsOfTile ? anybody : later, at)) return true;
        return false;
      },
      [&](unsigned at, typename Warp::SlotBits(&bits)[2]) {
        for (int j = 0; j < 2; ++j)
          bits[j] = Warp::bits_of(seen[(2 * (lane % 4) + j) * kTilesOfChunk + at / Warp::kStepsOfTile], at);
      },
      [&](int) { worker.store(record); });
}

static void attention_prefix(View partials, View q, View k, View v, View k_scale, View v_scale, View lengths,
                             BlockMaskView mask, int64_t length, float scale, Stream stream) {
  constexpr const char* kOp = "attention_prefix";
  check_cache(k, v, k_scale, v_scale, q, kOp);
  check_side(q, q, "q", kOp);
  const int64_t B = q.size[0], H = q.size[1], M = k.size[0], P = k.size[2], chunks = chunks_of(P);
  IGPT_CHECK(q.size[2] == 1 && P >= 1 && length >= 1 && length <= INT32_MAX / 2,
             "attention_prefix: one query a head, a prefix and a length");
  IGPT_CHECK(M > 0 ? B % M == 0 : B == 0, "attention_prefix: %lld queries do not share %lld prefixes", (long long)(B),
             (long long)(M));
  IGPT_CHECK(scale > 0.f, "attention_prefix: scale must be positive");
  check_partials(partials, q, kOp), check_lengths(lengths, B, kOp), check_mask_rows(mask, q, P + length, kOp);
  IGPT_CHECK(partials.size[2] >= chunks, "attention_prefix: partials must hold the prefix's %lld chunks",
             (long long)(chunks));
  IGPT_CHECK(!mask || P % kTile == 0, "attention_prefix: under a mask a prefix ends where a tile of %d does", kTile);
  if (B * H == 0) return;
  const int64_t neighbours = B / M, groups = (neighbours + kTogether - 1) / kTogether;
  const int64_t warps = std::min<int64_t>(groups, kPrefixWarps), blocks = (groups + warps - 1) / warps;
  IGPT_CHECK(M * H * chunks * blocks <= INT32_MAX && B * H <= INT32_MAX,
             "attention_prefix: too many heads for one launch");
  const OnDevice device(q);
  by_cache(q, k, [&]<class E, int D>() {
    LAUNCH((attention_prefix_kernel<D, E>), unsigned(M * H * chunks * blocks), unsigned(warps * 32), 0, stream,
           partials.as<float>(), int(partials.size[2]), Heads<const uint16_t>(q), q.dtype,
           Cache<E>(k, v, k_scale, v_scale), Lengths{lengths.as<int>(), int(length), int(P)}, Mask(mask), int(H),
           int(chunks), int(neighbours), int(blocks), scale * kLog2e);
  });
}

void fill_attention_prefix(Ops& t) {
  t.attention_prefix = attention_prefix;
}

}  // namespace cuda
}  // namespace igpt
