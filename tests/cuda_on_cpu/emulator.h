// Runs a CUDA kernel on one CPU thread. The blocks run one after another; the threads of a block are fibers, which change
// places only where they wait for each other. The order of the blocks, and of the threads between two such places, is
// drawn anew for every launch: a result that a missing barrier leaves to chance then changes, or meets poison.
#pragma once
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

constexpr int WARP = 32, MOST_THREADS = 1024, POISON = 0xff;  // such bytes are a NaN, or -1
constexpr size_t STACK = 256 << 10, GUARD = 4 << 10, MOST_SHARED = 163 << 10, SHARED_BY_DEFAULT = 48 << 10;  // bytes; sm_80

// The source line where a thread waits: threads that wait for each other must do so on the same one.
struct Place {
    const char* file;
    int line;
    bool operator!=(const Place& other) const { return file != other.file || line != other.line; }
    std::string text() const { return std::string(file).substr(std::string(file).rfind('/') + 1) + ":" + std::to_string(line); }
};

struct Copy {  // of cp.async
    void* to;
    const void* from;
    bool valid;
};

struct Fiber {
    jmp_buf context;
    bool born = false;
    dim3 thread;
    Place place;
    unsigned mask;  // the lanes that it waits for
    void* slot;     // what it brings to them
    std::vector<Copy> open;                 // group of copies
    std::vector<std::vector<Copy>> closed;  // ones, under way
};

struct Warp {
    unsigned lanes = 0, ready = 0, waiting = 0;  // all; those that can go on; those that wait for others of the warp
};

inline dim3 grid, block, block_index;
inline Fiber fibers[MOST_THREADS], *self;
inline Warp warps[MOST_THREADS / WARP];
inline int threads, alive, arrived;  // of this block; those that have not ended; those that wait for the whole block
inline Place barrier;
inline jmp_buf scheduler;
inline std::function<void()> kernel;
inline std::string error;
inline std::mt19937 order;
alignas(128) inline unsigned char shared[MOST_SHARED + GUARD];  // dynamic: what stands for `extern __shared__`
inline size_t shared_bytes;
inline std::map<const void*, size_t> allowed_shared;  // by kernel

inline int below(int n) { return int(order() % unsigned(n)); }

// Takes a random one out of a set of lanes.
inline int draw(unsigned& lanes) {
    unsigned rest = lanes;
    for (int skipped = below(__builtin_popcount(lanes)); skipped > 0; --skipped) rest &= rest - 1;
    lanes &= ~(rest & -rest);
    return __builtin_ctz(rest);
}

__attribute__((noinline)) inline void yield() {
    if (!_setjmp(self->context)) _longjmp(scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& message) {
    if (!self) throw std::runtime_error(message);  // not in a kernel
    error = message + ", by thread " + std::to_string(self - fibers) + " of block (" + std::to_string(block_index.x) + ", " +
            std::to_string(block_index.y) + ", " + std::to_string(block_index.z) + ")";
    _longjmp(scheduler, 1);
}

// A fiber's whole life: the kernels, one after another, on the same stack.
inline void live() {
    for (;;) {
        kernel();
        --alive;
        yield();
    }
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
    static char* const stacks = static_cast<char*>(
        mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    self = &fiber;
    if (_setjmp(scheduler)) return;
    if (fiber.born) _longjmp(fiber.context, 1);
    fiber.born = true;
    ucontext_t first;
    getcontext(&first);
    first.uc_stack = {stacks + (&fiber - fibers) * STACK, 0, STACK};
    makecontext(&first, live, 0);
    setcontext(&first);
}

// Waits until every lane of `mask` has come to the same place; the last one calls finish(slots, by lane).
template <class Slot, class Finish>
void meet_warp(unsigned mask, Place place, Slot& mine, Finish finish) {
    const int first = int(self - fibers) / WARP * WARP, lane = int(self - fibers) % WARP;
    Warp& warp = warps[first / WARP];
    mask &= warp.lanes;
    if (!(mask >> lane & 1)) fail(place.text() + ": the mask lacks the thread itself");
    self->place = place, self->mask = mask, self->slot = &mine;
    warp.waiting |= 1u << lane;
    if ((warp.waiting & mask) != mask) return yield();
    Slot* slots[WARP] = {};
    for (int i = 0; i < WARP; ++i)
        if (mask >> i & 1) {
            const Fiber& other = fibers[first + i];
            if (other.place != place || other.mask != mask) fail(place.text() + " meets " + other.place.text());
            slots[i] = static_cast<Slot*>(other.slot);
        }
    finish(slots);
    warp.waiting &= ~mask;
    warp.ready |= mask & ~(1u << lane);
}

// The same for the whole block; finish(slots, by thread).
template <class Slot, class Finish>
void meet_block(Place place, Slot& mine, Finish finish) {
    if (arrived++ == 0) barrier = place;
    self->place = place, self->slot = &mine;
    if (barrier != place) fail(place.text() + " meets " + barrier.text());
    if (arrived < threads) return yield();
    Slot* slots[MOST_THREADS];
    for (int i = 0; i < threads; ++i) slots[i] = static_cast<Slot*>(fibers[i].slot);
    finish(slots);
    arrived = 0;
    for (Warp& warp : warps) warp.ready = warp.lanes;
    warps[(self - fibers) / WARP].ready &= ~(1u << (self - fibers) % WARP);
}

// The bytes of the static __shared__ arrays, which are this library's thread_local variables.
inline thread_local unsigned char one_of_them;
inline std::pair<void*, size_t> static_shared() {
    one_of_them = POISON;  // the first touch makes a thread's copies of all of them
    std::pair<void*, size_t> found(nullptr, 0);
    dl_iterate_phdr([](dl_phdr_info* library, size_t, void* result) {
        bool ours = false;
        size_t size = 0;
        for (int i = 0; i < library->dlpi_phnum; ++i) {
            const auto& part = library->dlpi_phdr[i];
            const uintptr_t begin = library->dlpi_addr + part.p_vaddr, here = reinterpret_cast<uintptr_t>(&warps);
            if (part.p_type == PT_LOAD && begin <= here && here < begin + part.p_memsz) ours = true;
            if (part.p_type == PT_TLS) size = part.p_memsz;
        }
        if (ours) *static_cast<decltype(found)*>(result) = {library->dlpi_tls_data, size};
        return int(ours);
    }, &found);
    return found;
}

inline void run_block() {
    const auto statics = static_shared();
    threads = alive = int(block.x * block.y * block.z), arrived = 0;
    memset(statics.first, POISON, statics.second);
    memset(shared, POISON, shared_bytes + GUARD);
    for (Warp& warp : warps) warp = {};
    for (int i = 0; i < threads; ++i) {
        fibers[i].thread = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
        fibers[i].open.clear(), fibers[i].closed.clear();
        warps[i / WARP].lanes |= 1u << i % WARP;
        warps[i / WARP].ready = warps[i / WARP].lanes;
    }
    // A warp runs until it must wait for others, so that warps are as far apart as barriers let them be.
    for (int warp = 0; alive > 0;) {
        if (!warps[warp].ready) {
            std::vector<int> ready;
            for (int w = 0; w * WARP < threads; ++w)
                if (warps[w].ready) ready.push_back(w);
            if (ready.empty()) {
                std::set<std::string> places;
                if (arrived) places.insert(barrier.text());
                for (int i = 0; i < threads; ++i)
                    if (warps[i / WARP].waiting >> i % WARP & 1) places.insert(fibers[i].place.text());
                error = "threads wait for others that have ended or wait elsewhere, at";
                for (const auto& place : places) error += " " + place;
                return;
            }
            warp = ready[below(int(ready.size()))];
        }
        resume(fibers[warp * WARP + draw(warps[warp].ready)]);
        if (!error.empty()) return;
    }
}

// What stands for `<<<grid, block, bytes, stream>>>`: kernel ->* Launch(grid, block, bytes, stream)(arguments...)
template <class... Arguments>
struct Bound {
    dim3 grid, block;
    size_t bytes;
    std::tuple<Arguments...> arguments;
};
struct Launch {
    dim3 grid, block;
    size_t bytes;
    Launch(dim3 grid, dim3 block = 1, size_t bytes = 0, void* = nullptr) : grid(grid), block(block), bytes(bytes) {}
    template <class... Arguments>
    Bound<std::decay_t<Arguments>...> operator()(Arguments&&... arguments) const {
        return {grid, block, bytes, {arguments...}};
    }
};

inline bool launch_failed = false;  // since cudaGetLastError last reported it

template <class... Parameters, class... Arguments>
void operator->*(void (*function)(Parameters...), const Bound<Arguments...>& launch) {
    grid = launch.grid, block = launch.block;
    const auto found = allowed_shared.find(reinterpret_cast<void*>(function));
    const size_t allowed = found == allowed_shared.end() ? SHARED_BY_DEFAULT : found->second;
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, size = uint64_t(block.x) * block.y * block.z;
    if (launch.bytes > allowed || blocks == 0 || grid.x >= 1u << 31 || grid.y > 65535 || grid.z > 65535 || size == 0 ||
        size > MOST_THREADS) {
        launch_failed = true;
        return;
    }
    shared_bytes = launch.bytes;
    kernel = [&] { std::apply(function, launch.arguments); };
    error.clear();
    std::vector<unsigned> indices(blocks);
    std::iota(indices.begin(), indices.end(), 0u);
    std::shuffle(indices.begin(), indices.end(), order);
    for (const unsigned i : indices) {
        block_index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        run_block();
        const auto end = shared + shared_bytes;
        if (error.empty() && std::any_of(end, end + GUARD, [](int byte) { return byte != POISON; }))
            error = "a write past the end of the dynamic shared memory";
        if (!error.empty()) break;
    }
    self = nullptr;
    if (error.empty()) return;
    for (Fiber& fiber : fibers) fiber.born = false;  // those in the middle of this kernel stay there
    throw std::runtime_error(error);
}

}  // namespace emulator
