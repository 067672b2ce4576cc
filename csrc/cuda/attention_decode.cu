// attention_decode:  o = softmax(scale q K^T) V for one query a head over the first slots of a cache
//
// q, o [B, H, 1, D] bf16 or f16   k, v [B, H, T, D] of that dtype or e4m3 with scales, any strides that are multiples
// of 16 bytes   D 32, 64, 96 or 128   lengths i32 [B] on the device, where images differ or a CUDA graph goes on
// counting   mask: of the tiles in the query's row of it, what is seen; no other slot's step is read
// pages i32 [tiles] on the device, beside a mask: slot t is at pages[t / 64] * 64 + t % 64 of k, v and their scales
//
// A block owns a head, each of its warps every so manieth chunk of kDecodeChunk slots (attention_decode.cuh); what they
// found meets in shared memory. For few heads the sequence is split: a warp a chunk, `partials` in memory, and a second
// kernel that adds them up in the same order with the same text. `partials` may begin with those of a shared prefix.
//
// Bytes: the keys and values that are seen, once: of B = 16, H = 8, T = 1024, D = 64 in bf16 33.5 MB, at 4.27 TB/s 7.9
// us. Flops 4 D a slot, eight times that on the tensor cores, nothing beside their rate. In flight: 8 KB a warp (6 KB
// at D = 96), 8 to 16 warps a multiprocessor: 64 to 128 KB, where 4 TB/s at a latency of a microsecond ask for 31. A
// split writes and reads D + 2 floats for 128 slots: 1.6 % of bf16's bytes, from L2.
//
// Refuses: float32, other head dims, rows that do not begin at multiples of 16 bytes, masks behind a prefix that ends
// inside a tile.
#include <algorithm>

#include "attention_decode.cuh"

namespace igpt {
namespace cuda {

using namespace decode;

constexpr int kWarps = 8;   // of a block at most
constexpr int kRound = 32;  // chunks that a block has in shared memory at a time
// Threads of a multiprocessor at least, which bound the registers: 128 each, 168, or as many as there are.
template <int D, class E>
constexpr int kResident = D == 128                    ? 256
                          : D <= 64 && sizeof(E) == 2 ? 512
                                                      : 384;

// What both kernels know of the sequence.
struct Sequence {
  float* partials;  // [B, H, chunks, D + 2], or null
  int chunks;       // rows of partials of a head
  int given;        // of which so many are a prefix's
  int heads;
  Lengths lengths;
};

template <int D, class E>
__global__ void __launch_bounds__(kResident<D, E>)
    attention_decode_kernel(Heads<uint16_t> o,  // [B, H, 1, D]
                            Sequence sequence,
                            Heads<const uint16_t> q,  // [B, H, 1, D]
                            DType dtype,              // of o and q
                            Cache<E> cache,           // [B, H, T, D], scales [B, H, pages]
                            Mask mask, bool split, float scale2) {
  using Warp = Worker<D, E, 1>;
  STATIC_SMEM(float2, pairs, (kRound + 1) * (D + 2) / 2);  // they are written two floats at a time
  float* const records = reinterpret_cast<float*>(pairs);  // the first: what earlier rounds add up to
  STATIC_SMEM(uint64_t, seen, kRound* kTilesOfChunk);
  const int of_head = split ? sequence.chunks - sequence.given : 1;  // blocks
  const int bh = int(blockIdx.x / of_head), warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int slots = sequence.lengths[bh / sequence.heads], prefix = sequence.lengths.prefix;
  const int begin = split ? int(blockIdx.x % of_head) : 0;
  const int chunks = (slots + kDecodeChunk - 1) / kDecodeChunk, end = split ? min(chunks, begin + 1) : chunks;
  if (split && begin >= chunks) return;                                             // this image has fewer
  float* const kept = sequence.partials + int64_t(bh) * sequence.chunks * (D + 2);  // not read where there are none

  Warp worker(q[bh].row(0), dtype, scale2);
  for (int first = begin;; first += kRound) {
    const int count = min(kRound, end - first), tile = first * kTilesOfChunk;
    float* const found = split ? kept + int64_t(sequence.given + first) * (D + 2) : records + D + 2;

    // Who sees what.
    const auto clip = [&](int t) { return there(slots - (tile + t) * kTile); };
    for (int t = threadIdx.x; t < count * kTilesOfChunk; t += blockDim.x) seen[t] = mask.row_start ? 0 : clip(t);
    for (int i = threadIdx.x; i < count; i += blockDim.x) found[i * (D + 2) + D + 1] = 0.f;
    __syncthreads();
    if (mask.row_start) {
      mask.look(seen, prefix + slots - 1, prefix / kTile + tile, count * kTilesOfChunk, threadIdx.x, blockDim.x, clip);
      __syncthreads();
    }

    // Chunks.
    const auto bits = [&](unsigned at) { return Warp::bits_of(seen[at / Warp::kStepsOfTile], at); };
    const auto next = [&](unsigned& at) {
      for (; at < unsigned(count) * Warp::kSteps; at = Warp::after(at, warps))
        if (bits(at)) return true;
      return false;
    };
    worker.walk(
        cache, bh, first * kDecodeChunk, slots, warp * Warp::kSteps, warps, next,
        [&](unsigned at, typename Warp::SlotBits(&see)[1]) { see[0] = bits(at); },
        [&](int chunk) { worker.store({found + chunk * (D + 2)}); });
    if (split) return;
    __syncthreads();

    // What they add up to.
    Total<D> total;
    if (first > 0) total.add(records);
    for (int i = 0; i < sequence.given && first == 0; ++i) total.add(kept + i * (D + 2));
    for (int i = 0; i < count; ++i) total.add(found + i * (D + 2));
    if (first + kRound >= end) return total.store(o[bh].row(0), dtype);
    __syncthreads();  // all have read what the next round overwrites
    total.keep(records);
  }
}

template <int D>
__global__ void __launch_bounds__(D) attention_decode_merge_kernel(Heads<uint16_t> o,  // [B, H, 1, D]
                                                                   DType dtype, Sequence sequence) {
  const int bh = int(blockIdx.x);
  const int slots = sequence.lengths[bh / sequence.heads], chunks = (slots + kDecodeChunk - 1) / kDecodeChunk;
  const float* kept = sequence.partials + int64_t(bh) * sequence.chunks * (D + 2);
  Total<D> total;
  total.template add<8>(kept, sequence.given + chunks);  // from L2: each by itself would wait for it
  total.store(o[bh].row(0), dtype);
}

static void attention_decode(View o, View partials, View q, View k, View v, View k_scale, View v_scale, View lengths,
                             View pages, BlockMaskView mask, int64_t length, int64_t prefix, float scale,
                             Stream stream) {
  constexpr const char* kOp = "attention_decode";
  check_cache(k, v, k_scale, v_scale, q, kOp);
  check_side(q, q, "q", kOp), check_side(o, q, "o", kOp);
  IGPT_CHECK(q.size[2] == 1 && k.size[0] == q.size[0], "attention_decode: one query a head and a cache for each image");
  IGPT_CHECK(length >= 1 && (pages || length <= k.size[2]), "attention_decode: length must be in 1..%lld",
             (long long)(k.size[2]));
  IGPT_CHECK(!pages || (mask && pages.dtype == DType::i32 && pages.dense() && pages.numel() * kTile >= length &&
                        length <= INT32_MAX / 2),
             "attention_decode: pages must be dense int32, one for each %d slots, beside a mask", kTile);
  IGPT_CHECK(prefix >= 0 && prefix <= INT32_MAX / 2, "attention_decode: the prefix is too long");
  IGPT_CHECK(scale > 0.f, "attention_decode: scale must be positive");
  check_lengths(lengths, q.size[0], kOp), check_mask_rows(mask, q, prefix + length, kOp);
  IGPT_CHECK(!mask || prefix % kTile == 0, "attention_decode: behind a mask a prefix ends where a tile of %d does",
             kTile);
  const int64_t given = chunks_of(prefix), own = chunks_of(length), heads = q.size[0] * q.size[1];
  if (partials) check_partials(partials, q, kOp);
  const int64_t room = partials ? partials.size[2] : 0;
  IGPT_CHECK(room == given || room == given + own,
             "attention_decode: partials must hold the prefix's %lld chunks, or %lld with the cache's own",
             (long long)(given), (long long)(given + own));
  const bool split = room > given;
  IGPT_CHECK(heads * own <= INT32_MAX, "attention_decode: too many heads for one launch");
  if (heads == 0) return;
  const OnDevice device(q);
  // Many heads: several small blocks a multiprocessor, of which one begins while another ends.
  const int64_t most = heads > 2 * device_attribute(cudaDevAttrMultiProcessorCount) ? kWarps / 2 : kWarps;
  const unsigned threads = split ? 32 : unsigned(std::min(own, most)) * 32;
  const Sequence sequence{partials.as<float>(), int(room), int(given), int(q.size[1]),
                          Lengths{lengths.as<int>(), int(length), int(prefix)}};
  by_cache(q, k, [&]<class E, int D>() {
    LAUNCH((attention_decode_kernel<D, E>), unsigned(split ? heads * own : heads), threads, 0, stream,
           Heads<uint16_t>(o), sequence, Heads<const uint16_t>(q), q.dtype, Cache<E>(k, v, k_scale, v_scale, pages),
           Mask(mask), split, scale * kLog2e);
    if (split)
      LAUNCH(attention_decode_merge_kernel<D>, unsigned(heads), D, 0, stream, Heads<uint16_t>(o), q.dtype, sequence);
  });
}

void fill_attention_decode(Ops& t) {
  t.attention_decode = attention_decode;
}

}  // namespace cuda
}  // namespace igpt
