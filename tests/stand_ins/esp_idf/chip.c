/* A chip whose random number is TL_SEED, where each look at the clock takes a tick; it is switched off
 * after 20 texts. Its watchdog is ESP-IDF's: it wants the idle task to run every five seconds. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "bootloader_random.h"
#include "esp_log.h"
#include "esp_random.h"
#include "freertos/task.h"
#include "tapeless_model.h"

void app_main(void);

static TickType_t now, rested;
static int texts, noise;

void bootloader_random_enable(void)
{
    noise = 1;
}

void bootloader_random_disable(void)
{
    noise = 0;
}

uint32_t esp_random(void)
{
    return noise ? TL_SEED : 1; /* without a source of noise always the same */
}

uint32_t esp_log_timestamp(void)
{
    return now * (1000 / configTICK_RATE_HZ);
}

void esp_log_write(esp_log_level_t level, const char *tag, const char *format, ...)
{
    va_list arguments;
    (void)level;
    (void)tag;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
}

TickType_t xTaskGetTickCount(void)
{
    if (++now - rested > pdMS_TO_TICKS(5000)) {
        fputs("Task watchdog got triggered.\n", stderr);
        exit(1);
    }
    return now;
}

void vTaskDelay(const TickType_t ticks)
{
    if (ticks > 0)
        rested = now += ticks;
    if (ticks > 1 && ++texts == 20)
        exit(0);
}

int main(void)
{
    app_main();
    return 0;
}
