// Instructions that CUDA C++ has no name for. The emulator has a twin of each.
#pragma once
