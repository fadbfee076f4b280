// A board whose hardware's random number is TL_SEED, where each look at the clock takes ten milliseconds; it
// is switched off after 20 pauses. Its watchdog is the ESP32 core's: it wants a pause every five seconds.
#include <Arduino.h>
#include <stdio.h>
#include <stdlib.h>

#include "tapeless_model.h"

static unsigned long now, rested;
static int pauses;
static bool opened;

HardwareSerial Serial;

void HardwareSerial::begin(unsigned long baud)
{
    opened = baud == 115200;
}

HardwareSerial::operator bool() const
{
    return opened && now > 1000; // the computer takes a second to open it
}

static size_t written(int count)
{
    if (!Serial)
        exit(2);
    return static_cast<size_t>(count);
}

size_t Print::print(const char *text) { return written(printf("%s", text)); }
size_t Print::print(int number) { return written(printf("%d", number)); }
size_t Print::print(double number, int digits) { return written(printf("%.*f", digits, number)); }
size_t Print::println(const char *text) { return written(printf("%s\n", text)); }
size_t Print::println(unsigned long number) { return written(printf("%lu\n", number)); }
size_t Print::println(double number, int digits) { return written(printf("%.*f\n", digits, number)); }

unsigned long millis()
{
    now += 10;
    if (now - rested > 5000) {
        fputs("Task watchdog got triggered.\n", stderr);
        exit(1);
    }
    return now;
}

unsigned long micros() { return now * 1000; }

void delay(unsigned long ms)
{
    rested = now += ms;
    if (ms > 1 && ++pauses == 20)
        exit(0);
}

int analogRead(uint8_t)
{
    static uint32_t noise = 2463534242u;
    noise ^= noise << 13;
    noise ^= noise >> 17;
    noise ^= noise << 5;
    return static_cast<int>(noise & 1023u);
}

#ifdef ARDUINO_ARCH_ESP32
#include <esp_random.h>
uint32_t esp_random() { return TL_SEED; }
#endif

#ifdef ARDUINO_ARCH_RP2040
RP2040 rp2040;
uint32_t RP2040::hwrand32() { return TL_SEED; }
#endif

int main()
{
    setup();
    for (;;)
        loop();
}
