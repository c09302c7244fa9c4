// The parts of the emulator that are called from outside the kernels.
#include <cstdio>

#include "emulator.h"

// The order of blocks and threads of the launches that follow.
extern "C" void emulator_seed(unsigned seed) { emulator::order.seed(seed); }

// The compiler's checks of alignment and of array bounds (-fsanitize) end here, and not in its library.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void* address) {
    char text[40];
    snprintf(text, sizeof text, "%p", address);
    emulator::fail(std::string("a null or misaligned address, ") + text);
}
extern "C" void __ubsan_handle_out_of_bounds(void*, void* index) {
    emulator::fail("an index outside its array, " + std::to_string(reinterpret_cast<intptr_t>(index)));
}
