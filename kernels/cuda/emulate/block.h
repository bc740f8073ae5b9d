// A block of CUDA threads on one CPU thread: each thread is a fiber that runs until it must wait for others.
//
// The scheduler goes round the threads in one of three orders (forward, backward, shuffled anew each round) and lets
// each run to its next barrier or exchange. Code that leans on one order without a barrier gives another result in
// another. When nobody can go on, the launch fails and says who waits for what; nothing hangs.
#pragma once
#include <cstdarg>

#include "fiber.h"

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// CUDA's built-in variables. `threadIdx` changes with the fiber.
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static constexpr int warpSize = 32;

namespace emulate {

constexpr unsigned THREADS_MAX = 1024;
constexpr unsigned BARRIERS = 16;
constexpr unsigned COPIES_MAX = 128;
// What one lane can give in an exchange.
constexpr size_t EXCHANGE_BYTES = 64;

enum class State : uint8_t { ready, at_barrier, in_exchange, until, ended };
enum class Order : uint32_t { forward, backward, shuffled };

// What an exchange is given by its lanes and leaves for them, kept until the last of them comes to its next one. `given` are the
// lanes that have come.
struct Results {
    unsigned readers, given;
    alignas(16) unsigned char values[32][EXCHANGE_BYTES];
};

// A copy that `cp.async` began.
struct Copy {
    void* to;
    const void* from;
    unsigned bytes, total, group;
};

struct Thread {
    Fiber fiber;
    bool begun;
    State state;
    uint3 index;
    unsigned number;
    // At a barrier: which, and where in the source (0 if the source has no part in it).
    unsigned barrier;
    int line;
    // In an exchange: with whom and for what. `results` are those of the last one, or of the one that it waits for.
    unsigned mask;
    const char* what;
    Results* results;
    // Waiting until this holds.
    bool (*holds)(void*);
    void* holds_with;
    // Copies begun and not yet done; groups are numbered from the thread's start.
    unsigned copies, group;
};

struct Barrier {
    unsigned expected, arrived;
    int line;
};

static Thread threads[THREADS_MAX];
// Apart from the threads, which the scheduler goes along all the time.
static Copy copies[THREADS_MAX][COPIES_MAX];
static unsigned thread_count;
static Thread* current;
static Fiber scheduler;
static Barrier barriers[BARRIERS];
// One lane may hold on to old results while the others go on: at most one set per lane, and one being made.
static Results results[THREADS_MAX / 32][33];
// Lanes of each warp that wait in an exchange, and that have ended.
static unsigned exchanging[THREADS_MAX / 32], gone[THREADS_MAX / 32];
static unsigned char* dynamic_shared;
static char* message;
static size_t message_bytes;
static bool failed;

// Ends the launch with a message. Within a fiber it does not return.
__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    if (!failed) {
        failed = true;
        int at = snprintf(message, message_bytes, "block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
        if (current) at += snprintf(message + at, message_bytes - at, ", thread %u", current->number);
        at += snprintf(message + at, message_bytes - at, ": ");
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(message + at, message_bytes - at, format, arguments);
        va_end(arguments);
    }
    if (current) switch_fiber(current->fiber, scheduler);
}

// Lets others run until this thread is ready again.
inline void wait_for_others() {
    switch_fiber(current->fiber, scheduler);
}

inline unsigned lane() {
    return current->number % 32;
}

// ---- barriers

// Counts a thread that comes to a barrier, and frees the waiting ones when all are there.
inline void arrive(unsigned id, unsigned expected, int line) {
    if (id >= BARRIERS) return fail("barrier %u of %u", id, BARRIERS);
    Barrier& barrier = barriers[id];
    if (barrier.arrived == 0) barrier = {expected, 0, line};
    if (barrier.expected != expected)
        return fail("barrier %u of %u threads, others say %u", id, expected, barrier.expected);
    if (barrier.line != line)
        return fail("__syncthreads() in line %d while others wait in line %d", line, barrier.line);
    if (++barrier.arrived < expected) return;
    barrier.arrived = 0;
    for (unsigned i = 0; i < thread_count; ++i)
        if (threads[i].state == State::at_barrier && threads[i].barrier == id) threads[i].state = State::ready;
}

inline void await(unsigned id, unsigned expected, int line) {
    current->barrier = id;
    current->line = line;
    current->state = State::at_barrier;
    arrive(id, expected, line);
    // The last to come waits too, so that the order of the threads after a barrier is the scheduler's.
    wait_for_others();
}

inline void block_barrier(int line) {
    await(0, thread_count, line);
}

// `bar.sync id, threads`.
inline void named_barrier(unsigned id, unsigned expected) {
    await(id, expected, 0);
}

// `bar.arrive id, threads`: counts without waiting.
inline void named_arrive(unsigned id, unsigned expected) {
    arrive(id, expected, 0);
}

// Waits until `condition()` holds, which other threads' work must bring about (mbarriers, flags in shared memory).
template <class Condition>
inline void wait_until(Condition condition, const char* what) {
    if (condition()) return;
    current->what = what;
    current->holds = [](void* with) -> bool { return (*static_cast<Condition*>(with))(); };
    current->holds_with = &condition;
    current->state = State::until;
    wait_for_others();
}

// ---- asynchronous copies: done as late as the program allows, so that a missing wait shows

// `cp.async`: `bytes` are copied and the rest of `total` is zeroed.
inline void copy_later(void* to, const void* from, unsigned bytes, unsigned total) {
    Thread& me = *current;
    if (me.copies == COPIES_MAX) return fail("more than %u copies at once", COPIES_MAX);
    if (reinterpret_cast<uintptr_t>(to) % total || (bytes && reinterpret_cast<uintptr_t>(from) % total))
        return fail("cp.async of %u bytes is not aligned to them", total);
    copies[me.number][me.copies++] = {to, from, bytes, total, me.group};
}

inline void commit_copies() {
    current->group++;
}

// Waits until at most `newest` committed groups are under way.
inline void wait_copies(unsigned newest) {
    Thread& me = *current;
    Copy* const mine = copies[me.number];
    unsigned kept = 0;
    for (unsigned i = 0; i < me.copies; ++i) {
        const Copy& copy = mine[i];
        if (copy.group + newest >= me.group) {
            mine[kept++] = copy;
            continue;
        }
        memcpy(copy.to, copy.from, copy.bytes);
        memset(static_cast<unsigned char*>(copy.to) + copy.bytes, 0, copy.total - copy.bytes);
    }
    me.copies = kept;
}

// `cp.async.wait_all`: what was not committed too.
inline void wait_all_copies() {
    commit_copies();
    wait_copies(0);
}

// ---- the scheduler

static void (*kernel)(void**);
static void** kernel_arguments;

// Where every fiber begins.
inline void enter_thread() {
    kernel(kernel_arguments);
    // Hardware finishes what was begun; what nobody waited for must not be used by anybody.
    wait_all_copies();
    current->state = State::ended;
    gone[current->number / 32] |= 1u << current->number % 32;
    wait_for_others();
    abort();
}

// Why nobody goes on: the first thread of each kind of waiting, and how many there are.
inline void describe_standstill() {
    char text[512];
    int at = 0;
    const auto add = [&](const char* format, auto... values) {
        if (at < static_cast<int>(sizeof text)) at += snprintf(text + at, sizeof text - at, format, values...);
    };
    for (State state : {State::at_barrier, State::in_exchange, State::until, State::ended}) {
        unsigned count = 0;
        const Thread* first = nullptr;
        for (unsigned i = 0; i < thread_count; ++i) {
            if (threads[i].state != state) continue;
            if (!count++) first = &threads[i];
        }
        if (!count) continue;
        if (state == State::at_barrier)
            add("%u wait at a barrier (thread %u in line %d); ", count, first->number, first->line);
        else if (state == State::in_exchange)
            add("%u wait in %s (thread %u for lanes %08x); ", count, first->what, first->number, first->mask);
        else if (state == State::until)
            add("%u wait for %s (thread %u); ", count, first->what, first->number);
        else
            add("%u have ended; ", count);
    }
    current = nullptr;
    fail("nobody can go on: of %u threads %s", thread_count, text);
}

struct Shuffle {
    uint64_t state;
    unsigned below(unsigned limit) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return static_cast<unsigned>((state >> 32) % limit);
    }
};

// Runs one block; `blockIdx` is set.
inline void run_block(Order order, Shuffle& shuffle) {
    static unsigned turn[THREADS_MAX];
    for (unsigned i = 0; i < thread_count; ++i) {
        Thread& thread = threads[i];
        thread.begun = false;
        thread.state = State::ready;
        thread.number = i;
        thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        thread.results = nullptr;
        thread.copies = thread.group = 0;
        turn[i] = order == Order::backward ? thread_count - 1 - i : i;
    }
    memset(barriers, 0, sizeof barriers);
    for (unsigned warp = 0; warp < (thread_count + 31) / 32; ++warp) {
        exchanging[warp] = gone[warp] = 0;
        for (Results& r : results[warp]) r.readers = 0;
    }
    unsigned ended = 0;
    // A thread that never waits needs its stack for its run alone: the next one may begin on the same.
    unsigned stacks = 0, spare = ~0u;
    while (ended < thread_count) {
        if (order == Order::shuffled)
            for (unsigned i = thread_count - 1; i > 0; --i) {
                const unsigned j = shuffle.below(i + 1), kept = turn[i];
                turn[i] = turn[j];
                turn[j] = kept;
            }
        bool progress = false;
        for (unsigned i = 0; i < thread_count; ++i) {
            Thread& thread = threads[turn[i]];
            if (thread.state == State::until) {
                // Conditions may ask for the current thread's place.
                current = &thread;
                if (thread.holds(thread.holds_with)) thread.state = State::ready;
            }
            if (thread.state != State::ready) continue;
            progress = true;
            unsigned stack = ~0u;
            if (!thread.begun) {
                stack = spare != ~0u ? spare : stacks++;
                spare = ~0u;
                begin_fiber(thread.fiber, stack_top(stack), enter_thread);
                thread.begun = true;
            }
            current = &thread;
            threadIdx = thread.index;
            switch_fiber(scheduler, thread.fiber);
            current = nullptr;
            if (failed) return;
            if (thread.state == State::ended) {
                ++ended;
                if (stack != ~0u) spare = stack;
            }
        }
        if (!progress) return describe_standstill();
    }
    for (unsigned id = 0; id < BARRIERS; ++id)
        if (barriers[id].arrived) return fail("barrier %u has %u arrivals at the end", id, barriers[id].arrived);
}

}  // namespace emulate

#define __syncthreads() ::emulate::block_barrier(__LINE__)
