// Fibers: stacks that one OS thread switches between. By hand on x86-64, where a switch takes a few nanoseconds;
// ucontext, which asks the kernel each time, elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

constexpr size_t kStack = 128 * 1024;

#if defined(__x86_64__)

// Saves what a call must keep, stores the stack pointer in *from, and goes on where `to` was saved.
extern "C" void fastgpt_emulator_switch(void** from, void* to);
asm(R"(
.text
.weak fastgpt_emulator_switch
.type fastgpt_emulator_switch, @function
fastgpt_emulator_switch:
  pushq %rbp
  pushq %rbx
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
  popq %rbx
  popq %rbp
  ret
.size fastgpt_emulator_switch, .-fastgpt_emulator_switch
)");

struct Fiber {
  std::unique_ptr<unsigned char[]> stack;
  void* pointer = nullptr;

  void start(void (*entry)()) {
    if (!stack) stack.reset(new unsigned char[kStack]);
    uintptr_t top = (reinterpret_cast<uintptr_t>(stack.get()) + kStack) & ~uintptr_t{15};
    void** slots = reinterpret_cast<void**>(top) - 8;
    // Six registers, then the address to return to; on entry the stack must be 8 past a multiple of 16.
    for (int i = 0; i < 6; ++i) slots[i] = nullptr;
    slots[6] = reinterpret_cast<void*>(entry);
    slots[7] = nullptr;
    pointer = slots;
  }
};

inline void switch_fiber(Fiber& from, Fiber& to) { fastgpt_emulator_switch(&from.pointer, to.pointer); }

#else

struct Fiber {
  std::unique_ptr<unsigned char[]> stack;
  ucontext_t context;

  void start(void (*entry)()) {
    if (!stack) stack.reset(new unsigned char[kStack]);
    getcontext(&context);
    context.uc_stack.ss_sp = stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};

inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace emulator
