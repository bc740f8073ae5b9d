// Fibers: a stack each, and a switch between them that saves what the ABI asks a callee to save.
//
// On x86-64 the switch is a dozen instructions; elsewhere it is ucontext's, which enters the kernel for the signal mask.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulate {

// Register arrays of a kernel lie on its fiber's stack.
constexpr size_t STACK_BYTES = 256 << 10;

#if defined(__x86_64__)
// Pushes the callee-saved registers, keeps the stack pointer in *from, and continues where `to` left off.
extern "C" __attribute__((visibility("hidden"))) void ridge_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.hidden ridge_switch
.type ridge_switch, @function
.globl ridge_switch
ridge_switch:
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
.size ridge_switch, . - ridge_switch
)");
#endif

struct Fiber {
#if defined(__x86_64__)
    void* stack_pointer;
#else
    ucontext_t context;
#endif
};

// Runs `to` until it switches back.
inline void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__x86_64__)
    ridge_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
}

// Makes `fiber` begin with `enter`, which must never return, on the stack that ends before `top`.
inline void begin_fiber(Fiber& fiber, unsigned char* top, void (*enter)()) {
#if defined(__x86_64__)
    // A function is entered with the stack pointer 8 below a multiple of 16, as after a call.
    void** at = reinterpret_cast<void**>(top) - 1;
    *at = nullptr;
    *--at = reinterpret_cast<void*>(enter);
    for (int saved = 0; saved < 6; ++saved) *--at = nullptr;
    fiber.stack_pointer = at;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = top - STACK_BYTES;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
#endif
}

// The end of stack `index` of a pool that grows as it is asked, each with an unmapped page below: overflow is a fault,
// not a neighbour's damage.
inline unsigned char* stack_top(size_t index) {
    constexpr size_t MOST = 1024;
    static unsigned char* tops[MOST];
    if (!tops[index]) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        void* base = mmap(nullptr, STACK_BYTES + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED || mprotect(base, page, PROT_NONE) != 0) {
            perror("emulate: a fiber's stack");
            abort();
        }
        tops[index] = static_cast<unsigned char*>(base) + page + STACK_BYTES;
    }
    return tops[index];
}

}  // namespace emulate
