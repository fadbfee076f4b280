// Trains and generates on an Arduino board: prints the losses, then a text now and then, for ever.
// For boards of 32 bits: ESP32, RP2040, STM32 and others with enough memory.
#include <Arduino.h>
#ifdef ARDUINO_ARCH_ESP32
#include <esp_random.h>
#endif

#include "tapeless_model.h"
#include "tapeless_run.h"

#ifndef TL_LOG_EVERY
#define TL_LOG_EVERY 100
#endif

uint32_t random_seed()
{
#if defined(ARDUINO_ARCH_ESP32)
    return esp_random();
#elif defined(ARDUINO_ARCH_RP2040) && !defined(ARDUINO_ARCH_MBED) // arduino-pico
    return rp2040.hwrand32();
#else
    // Not all boards have a random generator: an open pin's noise, and how long it takes to read that.
    // If A0 is connected on yours, name another pin here.
    uint32_t seed = 0;
    for (int i = 0; i < 64; i++)
        seed = (seed ^ (uint32_t)analogRead(A0) ^ (uint32_t)micros()) * 1664525u + 1013904223u;
    return seed;
#endif
}

#if TL_TRAINS
bool train()
{
    unsigned long rested = millis();
    for (int i = 0; i < TL_STEPS; i++) {
        const float loss = tl_train(i);
        if (i == 0 || (i + 1) % TL_LOG_EVERY == 0) {
            Serial.print("step ");
            Serial.print(i + 1);
            Serial.print("/");
            Serial.print(TL_STEPS);
            Serial.print(": loss = ");
            Serial.println(loss, 6);
        }
        if (!(loss - loss == 0)) {
            Serial.println("loss is NaN or infinite: try a smaller learning rate");
            return false;
        }
        // The system's own tasks must run now and then: where they do not, a watchdog restarts the board.
        if (millis() - rested >= 1000) {
            delay(1);
            rested = millis();
        }
    }
    Serial.print("trained ");
    Serial.print(TL_STEPS);
    Serial.println(" steps");
    return true;
}
#endif

void setup()
{
    Serial.begin(115200);
    // A board that is its own USB port has none until the computer opens it.
    while (!Serial && millis() < 3000)
        delay(1);
    const uint32_t seed = random_seed(); // TL_SEED in its place repeats the host program
    Serial.print(TL_NAME ": ");
    Serial.print(TL_PARAMETERS);
    Serial.print(" parameters, seed ");
    Serial.println((unsigned long)seed);
    tl_begin(seed);
#if TL_TRAINS
    if (!train())
        for (;;)
            delay(1000);
#endif
}

void loop()
{
#if TL_GENERATES
    Serial.println(tl_generate());
#endif
    delay(500);
}
