/* Counts instructions of training steps on an emulated RISC-V chip (QEMU with -icount): in all and, compiled
 * with -finstrument-functions, in each op. Prints "name count calls" lines. */
#include <stdint.h>
#include <stdio.h>

#include "tapeless_model.h"
#include "tapeless_run.h"

#define QUIET __attribute__((no_instrument_function))

QUIET static uint64_t instructions(void)
{
    uint32_t low, high, again;
    do {
        __asm__ volatile("csrr %0, minstreth\n\tcsrr %1, minstret\n\tcsrr %2, minstreth"
                         : "=r"(high), "=r"(low), "=r"(again));
    } while (high != again);
    return ((uint64_t)high << 32) | low;
}

#define MOST 64
static struct {
    void *op;
    uint64_t count;
    uint32_t calls;
} ops[MOST];
static int depth;
static uint64_t entered;

QUIET void __cyg_profile_func_enter(void *op, void *site);
QUIET void __cyg_profile_func_exit(void *op, void *site);

QUIET void __cyg_profile_func_enter(void *op, void *site)
{
    (void)op;
    (void)site;
    if (depth++ == 0)
        entered = instructions();
}

QUIET void __cyg_profile_func_exit(void *op, void *site)
{
    const uint64_t now = instructions();
    (void)site;
    if (--depth > 0)
        return;
    for (int i = 0; i < MOST; i++)
        if (ops[i].op == op || !ops[i].op) {
            ops[i].op = op;
            ops[i].count += now - entered;
            ops[i].calls++;
            return;
        }
}

QUIET int main(void)
{
    tl_begin(TL_SEED);
#if TL_TRAINS
    for (int i = 0; i < MOST; i++) {
        ops[i].op = 0;
        ops[i].count = ops[i].calls = 0;
    }
    const uint64_t before = instructions();
    for (int i = 0; i < TL_STEPS; i++)
        tl_train(i);
    printf("all %llu %d\n", (unsigned long long)(instructions() - before), TL_STEPS);
#else
    const uint64_t before = instructions();
    for (int i = 0; i < 100; i++)
        tl_generate();
    printf("all %llu %d\n", (unsigned long long)(instructions() - before), 100);
#endif
    for (int i = 0; i < MOST && ops[i].op; i++)
        printf("%p %llu %lu\n", ops[i].op, (unsigned long long)ops[i].count, (unsigned long)ops[i].calls);
    return 0;
}
