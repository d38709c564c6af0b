/* Runs a compiled model on the files input_K.bin of a folder, and writes output_K.bin there.
   C99 and C++17. Built with -DHEADER='"NAME.h"' -DNAME=NAME; checks all that the interface
   promises on the way. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include HEADER

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define FN(suffix) JOIN(NAME, suffix)
#define MOST 64

static int fail(const char *what, int32_t status)
{
    fprintf(stderr, "%s: status %d (%s)\n", what, (int)status, FN(_status_text)(status));
    return 1;
}

static void *checked(void *memory)
{
    if (!memory) {
        fputs("no memory\n", stderr);
        exit(1);
    }
    return memory;
}

static FILE *file(const char *folder, const char *side, size_t index, const char *mode)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s_%u.bin", folder, side, (unsigned)index);
    return (FILE *)checked(fopen(path, mode));
}

/* A pool that runs its tasks last to first, and counts them. */
static int32_t backwards(void *context, void (*task)(void *, size_t), void *argument, size_t count)
{
    size_t *ran = (size_t *)context;
    while (count > 0) {
        task(argument, --count);
        ++*ran;
    }
    return 0;
}

static int32_t broken(void *context, void (*task)(void *, size_t), void *argument, size_t count)
{
    (void)context, (void)task, (void)argument, (void)count;
    return 1;
}

/* Lengths of the dims, where the model has some. */
#ifdef DIMS
static const int64_t lengths[] = {DIMS};
#else
static const int64_t lengths[] = {0};
#endif

/* Bytes of a tensor in this run. */
static size_t size_of(const kiln_port *port)
{
    size_t most = 1, now = 1, axis;
    for (axis = 0; axis < port->rank; axis++) {
        const int64_t dim = port->dims[axis];
        most *= (size_t)port->shape[axis];
        now *= (size_t)(dim < 0 ? port->shape[axis] : lengths[dim] + port->more[axis]);
    }
    return most == 0 ? 0 : port->size / most * now;
}

static kiln_call call_of(const void *const *inputs, void *const *outputs, void *scratch)
{
    kiln_call call;
    memset(&call, 0, sizeof call);
    call.abi_version = KILN_ABI_VERSION;
    call.inputs = inputs;
    call.outputs = outputs;
    call.scratch = scratch;
    call.scratch_size = FN(_scratch_size)();
#ifdef DIMS
    call.dims = lengths;
#endif
    return call;
}

/* What a wrong call gives: a status, and nothing else happens. */
static int misuse(kiln_call right)
{
    kiln_call call = right;
    kiln_port port;
    if (FN(_run_with)(NULL) != KILN_NULL_POINTER) return fail("no call", 0);
    call.abi_version = KILN_ABI_VERSION + 1;
    if (FN(_run_with)(&call) != KILN_ABI_MISMATCH) return fail("another version", 0);
    call = right;
    call.inputs = NULL;
    if (FN(_run_with)(&call) != KILN_NULL_POINTER) return fail("no inputs", 0);
    call = right;
    call.outputs = NULL;
    if (FN(_run_with)(&call) != KILN_NULL_POINTER) return fail("no outputs", 0);
    call = right;
    if (call.scratch_size > 0) {
        call.scratch_size -= 1;
        if (FN(_run_with)(&call) != KILN_SCRATCH_TOO_SMALL) return fail("little scratch", 0);
        call.scratch_size += 1;
        call.scratch = NULL;
        if (FN(_run_with)(&call) != KILN_NULL_POINTER) return fail("no scratch", 0);
    }
    if (FN(_dim_count)() > 0) {
        int64_t wrong[MOST];
        kiln_dim dim;
        memcpy(wrong, lengths, sizeof lengths);
        call = right;
        call.dims = NULL;
        if (FN(_run_with)(&call) != KILN_NULL_POINTER) return fail("no lengths", 0);
        call.dims = wrong;
        if (FN(_dim)(0, &dim) != KILN_OK) return fail("no dim", 0);
        wrong[0] = dim.most + 1;
        if (FN(_run_with)(&call) != KILN_DIM) return fail("too long", 0);
        wrong[0] = dim.least - 1;
        if (FN(_run_with)(&call) != KILN_DIM) return fail("too short", 0);
        if (!strstr(FN(_status_text)(KILN_DIM), dim.name)) return fail("no name", KILN_DIM);
    }
    if (FN(_dim)(FN(_dim_count)(), NULL) != KILN_NULL_POINTER) return fail("no place", 0);
    if (FN(_input)(FN(_input_count)(), &port) != KILN_NO_SUCH_INDEX) return fail("index", 0);
    if (FN(_output)(SIZE_MAX, &port) != KILN_NO_SUCH_INDEX) return fail("index", 0);
    if (FN(_input)(0, NULL) != KILN_NULL_POINTER) return fail("no port", 0);
    return 0;
}

int main(int argc, char **argv)
{
    const size_t inputs = FN(_input_count)(), outputs = FN(_output_count)();
    const void *in[MOST];
    void *out[MOST], *again[MOST];
    size_t sizes[MOST], i, ran = 0;
    kiln_pool pool;
    kiln_call call;
    kiln_port port;
    char *scratch;
    int32_t status;
    if (argc != 2 || inputs > MOST || outputs > MOST) return 2;
    if (FN(_abi_version)() != KILN_ABI_VERSION) return fail("version", KILN_ABI_MISMATCH);
    for (i = 0; i < inputs; i++) {
        FILE *from = file(argv[1], "input", i, "rb");
        void *memory;
        if ((status = FN(_input)(i, &port)) != KILN_OK) return fail("an input", status);
        memory = checked(malloc(size_of(&port) + 1));
        if (fread(memory, 1, size_of(&port) + 1, from) != size_of(&port)) return fail(port.name, -1);
        fclose(from);
        in[i] = memory;
    }
    for (i = 0; i < outputs; i++) {
        size_t elements = 1, axis;
        if ((status = FN(_output)(i, &port)) != KILN_OK) return fail("an output", status);
        for (axis = 0; axis < port.rank; axis++) elements *= (size_t)port.shape[axis];
        if (elements > port.size || port.name[0] == 0) return fail("an output", -1);
        sizes[i] = size_of(&port);
        out[i] = checked(calloc(sizes[i] + 1, 1));
        again[i] = checked(calloc(sizes[i] + 1, 1));
    }
    /* One byte past: scratch may start anywhere. */
    scratch = (char *)checked(malloc(FN(_scratch_size)() + 1));
    call = call_of(in, out, scratch + 1);
#ifdef WEIGHTS
    {
        FILE *from = (FILE *)checked(fopen(WEIGHTS, "rb"));
        char *memory = (char *)checked(malloc(FN(_weights_size)() + 64));
        memory += 64 - (uintptr_t)memory % 64;
        if (fread(memory, 1, FN(_weights_size)(), from) != FN(_weights_size)()) return 3;
        fclose(from);
        if (FN(_run_with)(&call) != KILN_NULL_POINTER) return fail("no weights", 0);
        call.weights = memory;
        if (FN(_run_with)(&call) != KILN_BAD_WEIGHTS) return fail("weights without a size", 0);
        call.weights_size = FN(_weights_size)();
        call.weights = memory + 1;
        if (FN(_run_with)(&call) != KILN_BAD_WEIGHTS) return fail("weights out of line", 0);
        call.weights = memory;
    }
    status = FN(_run_with)(&call);
#elif defined(DIMS)
    status = FN(_run_with)(&call);
#else
    status = FN(_run)(in, out, scratch + 1, FN(_scratch_size)());
#endif
    if (status != KILN_OK) return fail("a run", status);
    if (misuse(call) != 0) return 1;
    pool.context = &ran;
    pool.run = backwards;
    call.pool = &pool;
    call.outputs = again;
    if ((status = FN(_run_with)(&call)) != KILN_OK) return fail("a run with a pool", status);
    if (ran > 0) {
        pool.run = broken;
        if (FN(_run_with)(&call) != KILN_POOL_FAILED) return fail("a broken pool", 0);
        pool.run = backwards;
        if ((status = FN(_run_with)(&call)) != KILN_OK) return fail("after that", status);
    }
    for (i = 0; i < outputs; i++) {
        FILE *to = file(argv[1], "output", i, "wb");
        if (memcmp(out[i], again[i], sizes[i] + 1) != 0) return fail("a pool changes results", -1);
        if (fwrite(out[i], 1, sizes[i], to) != sizes[i] || fclose(to) != 0) return 3;
    }
    for (i = 0; i < inputs; i++) free((void *)in[i]);
    for (i = 0; i < outputs; i++) free(out[i]), free(again[i]);
    free(scratch);
    printf("%s, %u tasks\n", FN(_about)(), (unsigned)ran);
    return 0;
}
