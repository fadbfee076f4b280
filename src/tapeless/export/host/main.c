/* Trains and generates on any machine with a C compiler: prints the losses, then texts. */
#include <stdio.h>

#include "tapeless_model.h"
#include "tapeless_run.h"

#ifndef TL_LOG_EVERY
#define TL_LOG_EVERY 100
#endif
#ifndef TL_STOP
#define TL_STOP TL_STEPS /* or before they are done */
#endif
#ifndef TL_SAMPLES
#define TL_SAMPLES 20
#endif

int main(void)
{
    tl_begin(TL_SEED);
#if TL_TRAINS
    for (int i = 0; i < TL_STOP; i++) {
        const float loss = tl_train(i);
        if (i == 0 || (i + 1) % TL_LOG_EVERY == 0)
            printf("step %d/%d: loss = %.6f\n", i + 1, TL_STEPS, (double)loss);
    }
#endif
#if TL_GENERATES
    for (int i = 0; i < TL_SAMPLES; i++)
        printf("%s\n", tl_generate());
#endif
    return 0;
}
