/* Runs compiled models, one after another. Each line of standard input names a folder with net.so
   and input_K.bin, and dims_0.bin where the model has dims: their lengths. output_K.bin is
   written there, and a line is answered: the status of the run.
   Built with -I of a folder that has the header of any model by the name net.h. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "net.h"

#define MOST 64

static void *library;

static void stop(const char *what)
{
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static void *function(const char *name)
{
    void *address = dlsym(library, name);
    if (!address) stop(dlerror());
    return address;
}

/* A pointer to data is no pointer to a function in C99, but has its size where there is dlsym. */
#define FUNCTION(type, variable, name) \
    type variable;                     \
    do {                               \
        void *address = function(name); \
        memcpy(&variable, &address, sizeof address); \
    } while (0)

typedef size_t (*count_fn)(void);
typedef int32_t (*port_fn)(size_t, kiln_port *);
typedef int32_t (*run_fn)(const kiln_call *);

/* Bytes of a tensor for these lengths of dims. */
static size_t size_of(const kiln_port *port, const int64_t *dims)
{
    size_t most = 1, now = 1, axis;
    for (axis = 0; axis < port->rank; axis++) {
        const int64_t dim = port->dims[axis];
        most *= (size_t)port->shape[axis];
        now *= (size_t)(dim < 0 ? port->shape[axis] : dims[dim] + port->more[axis]);
    }
    return most == 0 ? 0 : port->size / most * now;
}

static void transfer(const char *folder, const char *name, size_t i, void *bytes, size_t size)
{
    char path[4096];
    const int in = name[0] != 'o';
    FILE *file;
    snprintf(path, sizeof path, "%s/%s_%u.bin", folder, name, (unsigned)i);
    file = fopen(path, in ? "rb" : "wb");
    if (!file) stop(path);
    if ((in ? fread(bytes, 1, size, file) : fwrite(bytes, 1, size, file)) != size) stop(path);
    if (fclose(file) != 0) stop(path);
}

static int32_t run(const char *folder)
{
    void *in[MOST], *out[MOST], *scratch;
    const void *given[MOST];
    int64_t lengths[MOST];
    size_t sizes[MOST], i;
    kiln_port port;
    kiln_call call;
    int32_t status;
    FUNCTION(count_fn, dims, "net_dim_count");
    FUNCTION(count_fn, inputs, "net_input_count");
    FUNCTION(count_fn, outputs, "net_output_count");
    FUNCTION(count_fn, scratch_size, "net_scratch_size");
    FUNCTION(port_fn, input, "net_input");
    FUNCTION(port_fn, output, "net_output");
    FUNCTION(run_fn, start, "net_run_with");
    if (inputs() > MOST || outputs() > MOST || dims() > MOST) stop("too many tensors");
    if (dims() > 0) transfer(folder, "dims", 0, lengths, dims() * sizeof lengths[0]);
    for (i = 0; i < inputs(); i++) {
        if (input(i, &port) != KILN_OK || !(in[i] = malloc(port.size + 1))) stop("an input");
        transfer(folder, "input", i, in[i], size_of(&port, lengths));
        given[i] = in[i];
    }
    for (i = 0; i < outputs(); i++) {
        if (output(i, &port) != KILN_OK || !(out[i] = malloc(port.size + 1))) stop("an output");
        sizes[i] = size_of(&port, lengths);
    }
    if (!(scratch = malloc(scratch_size() + 1))) stop("scratch");
    memset(&call, 0, sizeof call);
    call.abi_version = KILN_ABI_VERSION;
    call.inputs = given;
    call.outputs = out;
    call.scratch = scratch;
    call.scratch_size = scratch_size();
    call.dims = lengths;
    status = start(&call);
    for (i = 0; i < outputs(); i++) {
        if (status == KILN_OK) transfer(folder, "output", i, out[i], sizes[i]);
        free(out[i]);
    }
    for (i = 0; i < inputs(); i++) free(in[i]);
    free(scratch);
    return status;
}

int main(void)
{
    char folder[2048], path[4096];
    puts("ready");
    fflush(stdout);
    while (fgets(folder, sizeof folder, stdin)) {
        folder[strcspn(folder, "\n")] = 0;
        snprintf(path, sizeof path, "%s/net.so", folder);
        library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (!library) stop(dlerror());
        printf("%d\n", (int)run(folder));
        fflush(stdout);
        dlclose(library);
    }
    return 0;
}
