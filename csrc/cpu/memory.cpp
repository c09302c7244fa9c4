// Advice to the kernel about memory that a result is about to fill.
#include "common.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace par_xl::PAR_XL_ISA {

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: an error is no error
#endif
}

}  // namespace par_xl::PAR_XL_ISA
