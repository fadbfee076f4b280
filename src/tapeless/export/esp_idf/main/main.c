/* Trains and generates on an ESP32: logs the losses, then a text now and then, for ever. */
#include <inttypes.h>
#include <stdbool.h>

#include "bootloader_random.h"
#include "esp_log.h"
#include "esp_random.h"
#include "freertos/FreeRTOS.h"
#include "freertos/task.h"

#include "tapeless_model.h"
#include "tapeless_run.h"

#ifndef TL_LOG_EVERY
#define TL_LOG_EVERY 100
#endif

static const char *const TAG = "tapeless";

#if TL_TRAINS
static bool train(void)
{
    TickType_t rested = xTaskGetTickCount();
    for (int i = 0; i < TL_STEPS; i++) {
        const float loss = tl_train(i);
        if (i == 0 || (i + 1) % TL_LOG_EVERY == 0)
            ESP_LOGI(TAG, "step %d/%d: loss = %.6f", i + 1, TL_STEPS, (double)loss);
        if (!(loss - loss == 0)) {
            ESP_LOGE(TAG, "loss is NaN or infinite at step %d: try a smaller learning rate", i + 1);
            return false;
        }
        /* A core's idle task must run now and then: where it does not, the watchdog reports a hang. */
        if (xTaskGetTickCount() - rested >= pdMS_TO_TICKS(1000)) {
            vTaskDelay(1);
            rested = xTaskGetTickCount();
        }
    }
    ESP_LOGI(TAG, "trained %d steps", TL_STEPS);
    return true;
}
#endif

void app_main(void)
{
    bootloader_random_enable(); /* without Wi-Fi, random numbers have no other source of noise */
    const uint32_t seed = esp_random(); /* TL_SEED in its place repeats the host program */
    bootloader_random_disable();
    ESP_LOGI(TAG, "%s: %d parameters, seed %" PRIu32, TL_NAME, TL_PARAMETERS, seed);
    tl_begin(seed);
#if TL_TRAINS
    if (!train())
        return;
#endif
#if TL_GENERATES
    for (;;) {
        ESP_LOGI(TAG, "%s", tl_generate());
        vTaskDelay(pdMS_TO_TICKS(500));
    }
#endif
}
