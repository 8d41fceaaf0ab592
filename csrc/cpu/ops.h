// Every op of the CPU extension: its header, then its name. Included once per instruction-set level,
// inside that level's namespace and target region.
#include "vec.h"

#include "channel_stats.h"

#define TAILOR_OPS(X) X(channel_stats)
