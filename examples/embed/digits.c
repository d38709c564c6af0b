/* Says what digit a drawing shows, by a network that was compiled into a library:
     kiln compile examples/digits.onnx --dim batch=1 -o digits.so
     cc examples/embed/digits.c -I. -o digits digits.so -Wl,-rpath,.
     ./digits */
#include <stdio.h>
#include <stdlib.h>

#include "digits.h"

static const char *const drawing[8] = {
    "  .#+   ", "  +#.   ", "  #+    ", "  #.    ", " .##++. ", " .#++++ ", "  #+.#+ ", "  .##+. ",
};

static float ink(char c)
{
    return c == '#' ? 1.0f : c == '+' ? 0.7f : c == '.' ? 0.2f : 0.0f;
}

int main(void)
{
    float image[64], scores[10];
    const void *inputs[] = {image};
    void *outputs[] = {scores}, *scratch = malloc(DIGITS_SCRATCH_SIZE);
    int32_t status;
    int i, best = 0;
    for (i = 0; i < 64; i++) image[i] = ink(drawing[i / 8][i % 8]);
    status = digits_run(inputs, outputs, scratch, DIGITS_SCRATCH_SIZE);
    free(scratch);
    if (status != KILN_OK) {
        fprintf(stderr, "%s\n", digits_status_text(status));
        return 1;
    }
    for (i = 1; i < 10; i++) {
        if (scores[i] > scores[best]) best = i;
    }
    for (i = 0; i < 8; i++) puts(drawing[i]);
    printf("is a %d\n", best);
    return 0;
}
