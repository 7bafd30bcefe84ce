// What Python checks about calls.h when it loads the library.
#include "calls.h"

#include <cstring>

// The size of a struct of calls.h in bytes, without the array behind it; 0 for a name that is not known.
extern "C" int64_t lora_struct_size(const char* name) {
#define SIZE(T) \
    static_assert(sizeof(T) % 8 == 0 && alignof(T) == 8, "calls.py takes every member for 8 bytes"); \
    if (!strcmp(name, #T)) return (int64_t)sizeof(T);
    SIZE(Pool) SIZE(WriteCall) SIZE(AttentionCall)
    SIZE(Group) SIZE(DeltaOutput) SIZE(DeltaCall)
    SIZE(LinearOutput) SIZE(LinearCall) SIZE(GroupedLinearCall)
    SIZE(PackCall) SIZE(RowsCall)
    SIZE(NormCall) SIZE(GatedCall) SIZE(Heads) SIZE(RopeCall) SIZE(AddCall)
#undef SIZE
    return 0;
}
