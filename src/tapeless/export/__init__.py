"""Models as C programs for microcontrollers, this machine and the browser: `tapeless export`.

trace.py       the schedule, run with ops that write down how they are called
ops.py         which ops have a C version, and how they are called there
lifetimes.py   what lives when, and so what may share memory
drawing.py     a picture of that
firmware.py    what is exported: model, weights, data, from a preset or a trained model
int8.py        weights in a quarter of the flash
weights.py     the first weights of a program that trains
program.py     the calls, places and tables as C
budget.py      RAM and flash, and whether a chip has them
files.py       the folder: c/ in every project, host/, and plain/, esp_idf/, arduino/ or wasm/
wasm.py        compiles the web page
export.py      all of it, in order
"""
