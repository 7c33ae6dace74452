// What the tests set and ask.
#include "emulator.h"

extern "C" {
void fastgpt_emulator_seed(uint64_t seed) { emulator::seed = seed; }
int64_t fastgpt_emulator_launches() { return emulator::launches; }
}
