/* Generates tokens with a compiled language model that keeps its caches in place: each is one piece
   of memory, with room for the longest text, and a run writes behind what is there. C99.
   generate TOKEN COUNT, built with -DHEADER and -DNAME as run.c is. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include HEADER

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define FN(suffix) JOIN(NAME, suffix)
#define PORTS 16

static void *memory(size_t size)
{
    void *block = calloc(size ? size : 1, 1);
    if (!block) {
        fputs("no memory\n", stderr);
        exit(1);
    }
    return block;
}

int main(int argc, char **argv)
{
    void *inputs[PORTS], *outputs[PORTS];
    int64_t token, position = 0, past;
    size_t i, best, words = 0;
    const size_t caches = FN(_output_count)() - 1;
    size_t paired = 0;
    kiln_call call = {KILN_ABI_VERSION, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    kiln_port port;

    if (argc != 3 || FN(_input_count)() > PORTS || FN(_output_count)() > PORTS)
        return 1;
    for (i = 0; i < FN(_input_count)(); i++) {
        FN(_input)(i, &port);
        inputs[i] = memory(port.size);
        if (port.state > 0) {
            kiln_port other;
            FN(_output)((size_t)port.state - 1, &other);
            if (other.state != (int32_t)i + 1 || other.size != port.size)
                return 1;
            paired++;
        }
    }
    if (paired != caches)
        return 1;
    for (i = 0; i < FN(_output_count)(); i++) {
        FN(_output)(i, &port);
        /* Nobody follows the pointer of a state. */
        outputs[i] = port.state ? NULL : memory(port.size);
        if (!port.state)
            words = (size_t)port.shape[port.rank - 1];
    }
    call.inputs = (const void *const *)inputs;
    call.outputs = outputs;
    call.scratch_size = FN(_scratch_size)();
    call.scratch = memory(call.scratch_size);
    call.dims = &past;
    token = atoi(argv[1]);
    for (past = 0; past < atoi(argv[2]); past++, position++) {
        const float *scores = (const float *)outputs[0];
        int32_t status;
        *(int64_t *)inputs[0] = token;
        *(int64_t *)inputs[1] = position;
        status = FN(_run_with)(&call);
        if (status) {
            fprintf(stderr, "%s\n", FN(_status_text)(status));
            return 1;
        }
        for (best = 0, i = 1; i < words; i++)
            best = scores[i] > scores[best] ? i : best;
        token = (int64_t)best;
        printf("%u ", (unsigned)best);
    }
    return 0;
}
