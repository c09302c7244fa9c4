// The parts of the emulator that are called from outside the kernels.
#include "emulator.h"

// The order of blocks and threads of the launches that follow.
extern "C" void emulator_seed(unsigned seed) { emulator::order.seed(seed); }

// The compiler's checks of alignment and of array bounds (-fsanitize) end here, and not in its library. What they pass
// begins with the place.
extern "C" void __ubsan_handle_type_mismatch_v1(const emulator::Place* place, void*) {
    emulator::fail(place->text() + ": a null or misaligned address");
}
extern "C" void __ubsan_handle_out_of_bounds(const emulator::Place* place, void*) {
    emulator::fail(place->text() + ": an index outside its array");
}
