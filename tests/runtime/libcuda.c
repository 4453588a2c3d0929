// A libcuda.so.1 without a GPU, as strict as the real one about contexts, handles and sizes. It knows two devices. What it is
// asked goes to the file that FAKE_CUDA_LOG names, a line a call; without one it only answers, for measuring.
// The calls that PyCUDA's module needs to be loaded and that are not here are appended by the test.
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NO_BINARY = 209,
       INVALID_HANDLE = 400, NOT_FOUND = 500, LAUNCH_FAILED = 719 };
enum { DEVICES = 2, DEPTH = 8, STATIC_ROOM = 49152, OPT_IN = 232448 };

typedef struct { int device, retained; } Context;
typedef struct { Context *context; int number; } Stream;
typedef struct { Context *context; } Module;
typedef struct { Context *context; char name[64]; int room; } Function;

static Context primary[DEVICES] = {{0, 0}, {1, 0}};
static Stream streams[64];
static int made;
static __thread Context *stack[DEPTH];
static __thread int depth;

static void note(const char *format, ...) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  static FILE *log;
  static int looked;
  pthread_mutex_lock(&lock);
  if (!looked && getenv("FAKE_CUDA_LOG")) log = fopen(getenv("FAKE_CUDA_LOG"), "a");
  looked = 1;
  if (log) {
    va_list values;
    va_start(values, format);
    vfprintf(log, format, values);
    va_end(values);
    fflush(log);
  }
  pthread_mutex_unlock(&lock);
}

static Context *current(void) { return depth ? stack[depth - 1] : NULL; }

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : getenv("FAKE_CUDA_INIT") ? atoi(getenv("FAKE_CUDA_INIT")) : OK; }
int cuGetErrorString(int code, const char **text) {
  *text = code == INVALID_VALUE ? "invalid argument" : code == INVALID_CONTEXT ? "invalid device context"
        : code == INVALID_IMAGE ? "device kernel image is invalid" : code == NOT_FOUND ? "named symbol not found"
        : code == INVALID_HANDLE ? "invalid resource handle" : code == 100 ? "no CUDA-capable device is detected"
        : code == LAUNCH_FAILED ? "unspecified launch failure" : "another error";
  return OK;
}
int cuDeviceGetCount(int *count) { return *count = DEVICES, OK; }
int cuDeviceGet(int *device, int ordinal) {
  if (ordinal < 0 || ordinal >= DEVICES) return INVALID_DEVICE;
  return *device = ordinal, OK;
}
int cuDevicePrimaryCtxRetain(Context **context, int device) {
  *context = &primary[device];
  note("retain %d\n", device);
  return ++primary[device].retained, OK;
}
int cuDevicePrimaryCtxRelease_v2(int device) {
  if (primary[device].retained < 1) return INVALID_CONTEXT;
  note("release %d\n", device);
  return --primary[device].retained, OK;
}
int cuCtxDetach(Context *context) { return note("detach %d\n", context->device), OK; }
int cuCtxPushCurrent_v2(Context *context) {
  if (depth == DEPTH) return INVALID_CONTEXT;
  return stack[depth++] = context, OK;
}
int cuCtxPopCurrent_v2(Context **context) {
  if (!depth) return INVALID_CONTEXT;
  return *context = stack[--depth], OK;
}
int cuCtxGetDevice(int *device) { return current() ? (*device = current()->device, OK) : INVALID_CONTEXT; }
// What torch does when it makes a device current: it replaces the context on top.
int fakeSetDevice(int device) {
  if (!depth) depth = 1;
  return stack[depth - 1] = &primary[device], OK;
}
int fakeDepth(void) { return depth; }

int cuStreamCreate(Stream **stream, unsigned flags) {
  if (!current() || made == 64) return INVALID_CONTEXT;
  *stream = &streams[made];
  streams[made] = (Stream){current(), made};
  note("stream %d device=%d flags=%u\n", made, current()->device, flags);
  return ++made, OK;
}
int cuStreamDestroy_v2(Stream *stream) { return note("destroy %d\n", stream->number), OK; }

int cuModuleLoadDataEx(Module **module, const void *image, unsigned count, int *options, void **values) {
  if (!current()) return INVALID_CONTEXT;
  for (unsigned i = 0; i < count; ++i)
    if (options[i] == 4 || options[i] == 6) values[i] = 0;  // bytes written to the logs
  if (memcmp(image, "\x7f" "ELF", 4)) return INVALID_IMAGE;
  *module = malloc(sizeof **module);
  (*module)->context = current();
  return OK;
}
int cuModuleUnload(Module *module) { return note("unload %d\n", module->context->device), OK; }
int cuModuleGetFunction(Function **function, Module *module, const char *name) {
  if (!strcmp(name, "missing")) return NOT_FOUND;
  *function = malloc(sizeof **function);
  (*function)->context = module->context;
  (*function)->room = STATIC_ROOM;
  snprintf((*function)->name, sizeof (*function)->name, "%s", name);
  return OK;
}
int cuFuncGetAttribute(int *value, int attribute, Function *function) {
  if (attribute != 8) return INVALID_VALUE;
  return *value = function->room, OK;
}
int cuFuncSetAttribute(Function *function, int attribute, int value) {
  if (current() != function->context) return INVALID_CONTEXT;
  if (attribute != 8 || value > OPT_IN) return INVALID_VALUE;
  note("room %s %d\n", function->name, value);
  return function->room = value, OK;
}
int cuLaunchKernel(Function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, Stream *stream, void **parameters, void **extra) {
  if (current() != function->context) return INVALID_CONTEXT;
  if (stream && stream->context != function->context) return INVALID_HANDLE;
  if (!(gx && gy && gz && bx && by && bz) || bx * by * bz > 1024 || (int)shared > function->room) return INVALID_VALUE;
  if (parameters || !extra || extra[0] != (void *)1 || extra[2] != (void *)2 || extra[4]) return INVALID_VALUE;
  if (!strcmp(function->name, "failing")) return LAUNCH_FAILED;
  if (!getenv("FAKE_CUDA_LOG")) return OK;
  const unsigned char *bytes = extra[1];
  const size_t size = *(size_t *)extra[3];
  char hex[1025] = "";
  for (size_t i = 0; i < size && i < 512; ++i) sprintf(hex + 2 * i, "%02x", bytes[i]);
  note("launch %s device=%d grid=%u,%u,%u block=%u,%u,%u shared=%u stream=%d arguments=%s\n", function->name,
       function->context->device, gx, gy, gz, bx, by, bz, shared, stream ? stream->number : -1, hex);
  return OK;
}
