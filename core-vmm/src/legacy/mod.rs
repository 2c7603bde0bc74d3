//! What is left of a PC: a serial port for debugging, a clock that answers, registers to end.

pub mod panic;
pub mod power;
pub mod rtc;
pub mod serial;
