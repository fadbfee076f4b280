/* Stands in for FreeRTOS's header. */
#pragma once

#include "freertos/FreeRTOS.h"

void vTaskDelay(const TickType_t xTicksToDelay);
TickType_t xTaskGetTickCount(void);
