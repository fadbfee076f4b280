/* Stands in for ESP-IDF's header: what the exported main.c takes from it, as it is published. */
#pragma once

#include <inttypes.h>

typedef enum {
    ESP_LOG_NONE,
    ESP_LOG_ERROR,
    ESP_LOG_WARN,
    ESP_LOG_INFO,
    ESP_LOG_DEBUG,
    ESP_LOG_VERBOSE
} esp_log_level_t;

uint32_t esp_log_timestamp(void);
void esp_log_write(esp_log_level_t level, const char *tag, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The original takes a format alone too, which is not standard C. */
#define ESP_LOGI(tag, format, ...)                                                                     \
    esp_log_write(ESP_LOG_INFO, tag, "I (%" PRIu32 ") %s: " format "\n", esp_log_timestamp(), tag, __VA_ARGS__)
#define ESP_LOGE(tag, format, ...)                                                                     \
    esp_log_write(ESP_LOG_ERROR, tag, "E (%" PRIu32 ") %s: " format "\n", esp_log_timestamp(), tag, __VA_ARGS__)
