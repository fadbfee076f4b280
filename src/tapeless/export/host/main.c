/* Trains and generates on any machine with a C compiler: prints the losses, then texts. */
#include <stdio.h>
#include <string.h>

#include "tapeless_model.h"
#include "tapeless_run.h"

#ifndef TL_LOG_EVERY
#define TL_LOG_EVERY 100
#endif
#ifndef TL_STOP
#define TL_STOP TL_STEPS /* or before they are done */
#endif

int main(void)
{
    tl_begin(TL_SEED);
#if TL_TRAINS
    for (int i = 0; i < TL_STOP; i++) {
        const float loss = tl_train(i);
        if (i == 0 || (i + 1) % TL_LOG_EVERY == 0)
            printf("step %d/%d: loss = %.6f\n", i + 1, TL_STEPS, (double)loss);
        if (!(loss - loss == 0)) {
            printf("loss is NaN or infinite at step %d: try a smaller learning rate\n", i + 1);
            return 1;
        }
    }
#endif
#if TL_GENERATES
    int several = 0; /* lines in a text: from then on there is one between texts */
    for (int i = 0; i < TL_SAMPLES; i++) {
        const char *text = tl_generate();
        several = several || strchr(text, '\n');
        if (several && i)
            puts("---");
        puts(text);
    }
#endif
    return 0;
}
