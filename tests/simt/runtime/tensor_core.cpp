// ldmatrix and mma.sync by the fragment layouts of the PTX ISA: lane l holds, of each 8 x 8 matrix, row l / 4 and
// columns 2 (l % 4) and the next.
#include <cstring>

#include "runtime.h"
#include "simt_ptx.h"

namespace simt {

namespace {
struct MatrixLoad {
  uint32_t* r;
  const unsigned char* row;
  int count;
  bool transpose;
};
struct Multiply {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  bool bf16;
};
}  // namespace

void load_matrices(uint32_t* r, int count, bool transpose, uint32_t address, const char* file, int line) {
  // Lane 8 m + i names row i of matrix m; the lanes past those name nothing.
  Fiber* f = current();
  const bool named = int(f->lane) < 8 * count;
  const unsigned char* row = named ? shared_at(address, 16, 16, "ldmatrix") : nullptr;
  if (named && address / kWindow) fail("ldmatrix reads the block's own shared memory only");
  if (named) note_read(row, 16);
  const Quiet quiet;
  MatrixLoad mine{r, row, count, transpose};
  Meeting* m;
  if (!meet(0xffffffffu, &mine, {transpose ? "ldmatrix.trans" : "ldmatrix", file, "", line}, &m)) return;
  for (int k = 0; k < count; ++k) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], static_cast<MatrixLoad*>(m->slot[8 * k + i])->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t low = transpose ? matrix[j][i] : matrix[i][j];
      const uint32_t high = transpose ? matrix[j + 1][i] : matrix[i][j + 1];
      static_cast<MatrixLoad*>(m->slot[lane])->r[k] = low | high << 16;
    }
  }
  release(m);
}

void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf16, const char* file, int line) {
  const Quiet quiet;
  Multiply mine{d, a, {b0, b1}, bf16};
  Meeting* m;
  if (!meet(0xffffffffu, &mine, {"mma.sync", file, "", line}, &m)) return;
  const auto value = [bf16](uint32_t pair, int half) {
    const auto h = uint16_t(half ? pair >> 16 : pair);
    return bf16 ? bf16_to_float(h) : half_to_float(h);
  };
  float A[16][16], B[16][8], C[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* s = static_cast<Multiply*>(m->slot[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int h = 0; h < 2; ++h) {
      for (int i = 0; i < 4; ++i) A[group + i % 2 * 8][pair + i / 2 * 8 + h] = value(s->a[i], h);
      for (int i = 0; i < 2; ++i) B[pair + i * 8 + h][group] = value(s->b[i], h);
      for (int i = 0; i < 2; ++i) C[group + i * 8][pair + h] = s->d[2 * i + h];
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) C[i][j] += A[i][k] * B[k][j];
  for (int lane = 0; lane < 32; ++lane) {
    auto* s = static_cast<Multiply*>(m->slot[lane]);
    for (int i = 0; i < 4; ++i) s->d[i] = C[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
  release(m);
}

}  // namespace simt
