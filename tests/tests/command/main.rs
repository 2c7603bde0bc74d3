//! README's first command, `cargo xtask run`, as a user types it: what passes through it, whichever
//! host it chooses. All of these tests share one emulated host where they need one.

mod host;
mod setup;
mod streams;
mod terminal;
