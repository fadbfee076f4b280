/* Training and generating around the model: random numbers, documents, learning rates, texts.
 * The same for every model; tapeless_model.h says which this is. */
#ifndef TAPELESS_RUN_H
#define TAPELESS_RUN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Begin: seed the random numbers, and give the weights their first values. With TL_SEED everything is as
 * the exporting program does it, number for number. Other seeds give other texts, begin at another document
 * and, where TL_DRAWS_WEIGHTS, with other weights. */
void tl_begin(uint32_t seed);

/* Do training step `step` (from 0, each once, in turn) of TL_STEPS. Returns its loss, in nats a token. */
float tl_train(int step);

/* A new text, in memory that the next one takes. */
const char *tl_generate(void);

#ifdef __cplusplus
}
#endif
#endif
