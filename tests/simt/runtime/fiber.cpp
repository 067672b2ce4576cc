// Stacks and the switch between them. Sixteen instructions instead of a library: a switch saves only what the calling
// convention keeps across a call.
#include <sys/mman.h>

#include <new>

#include "runtime.h"

#if defined(__x86_64__)
asm(R"(
.text
.type simt_switch,@function
simt_switch:
  pushq %rbx
  pushq %rbp
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbp
  popq %rbx
  ret
.size simt_switch,.-simt_switch
)");
static constexpr int kSavedWords = 6, kReturnWord = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.type simt_switch,%function
simt_switch:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
.size simt_switch,.-simt_switch
)");
static constexpr int kSavedWords = 20, kReturnWord = 1;
#else
#error "the bench switches stacks by hand and knows x86-64 and aarch64 only"
#endif
// Saves the caller's registers on its stack, whose pointer goes to *from, and continues where `to` was saved.
extern "C" void simt_switch(void** from, void* to);

namespace simt {

constexpr size_t kStack = 256 << 10;  // touched only as far as it is used

// The first code on a fresh stack.
static void first() {
#if SIMT_ASAN
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  Cluster* c = cluster();
  if (!c->main_stack) c->main_stack = bottom, c->main_stack_bytes = bytes;
#endif
  thread_main();
}

void make_stack(Fiber* f) {
  void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  f->stack = static_cast<unsigned char*>(p);
  mprotect(f->stack, kPage, PROT_NONE);  // an overflow faults
#if defined(SIMT_TSAN)
  f->tsan = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
  if (stack) munmap(stack, kStack);
}

void reset_stack(Fiber* f) {
#if SIMT_ASAN
  __asan_unpoison_memory_region(f->stack + kPage, kStack - kPage);
#endif
  // Stacks start at different cache sets, or a warp's lanes would evict each other.
  auto top = uintptr_t(f->stack) + kStack - 128 - (f->linear * 7 % 64) * 64;
  void** word = reinterpret_cast<void**>(top / 16 * 16) - 1;  // a return address above would sit here
  *word = nullptr;
#if defined(__x86_64__)
  *--word = reinterpret_cast<void*>(&first);
#endif
  word -= kSavedWords;
  for (int i = 0; i < kSavedWords; ++i) word[i] = nullptr;
#if defined(__aarch64__)
  word = reinterpret_cast<void**>(uintptr_t(word) / 16 * 16);
#endif
  word[kReturnWord] = reinterpret_cast<void*>(&first);
  f->stack_pointer = word;
  f->fake_stack = nullptr;
}

void switch_fibers(Fiber* from, Fiber* to) {
  self = to;
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(to->tsan, 1);  // 1: the switch orders nothing
#endif
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(from->state == State::done ? nullptr : &from->fake_stack, to->stack, kStack);
#endif
  simt_switch(&from->stack_pointer, to->stack_pointer);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

void enter_fibers(Cluster* c, Fiber* to) {
  self = to;
#if defined(SIMT_TSAN)
  c->main_tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to->tsan, 1);
#endif
#if SIMT_ASAN
  c->main_stack = nullptr;
  __sanitizer_start_switch_fiber(&c->main_fake_stack, to->stack, kStack);
#endif
  simt_switch(&c->main_stack_pointer, to->stack_pointer);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(c->main_fake_stack, nullptr, nullptr);
#endif
  self = nullptr;
}

void leave_fibers() {
  Cluster* c = cluster();
  Fiber* f = current();
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(c->main_tsan, 1);
#endif
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(nullptr, c->main_stack, c->main_stack_bytes);
#endif
  simt_switch(&f->stack_pointer, c->main_stack_pointer);
  __builtin_unreachable();
}

}  // namespace simt
