// Stands in for a core's header: what the exported sketch takes from it, as Arduino's reference has it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define A0 0

class Print {
public:
    size_t print(const char *text);
    size_t print(int number);
    size_t print(double number, int digits = 2);
    size_t println(const char *text);
    size_t println(unsigned long number);
    size_t println(double number, int digits = 2);
};

class HardwareSerial : public Print {
public:
    void begin(unsigned long baud);
    operator bool() const;
};

extern HardwareSerial Serial;

int analogRead(uint8_t pin);
unsigned long millis();
unsigned long micros();
void delay(unsigned long ms);

void setup();
void loop();

#ifdef ARDUINO_ARCH_RP2040
class RP2040 {
public:
    uint32_t hwrand32();
};
extern RP2040 rp2040;
#endif
