//! What `build.rs` made of `proto/agent.proto`; no line here is written by hand.
#![allow(
    clippy::all,
    clippy::allow_attributes,
    clippy::absolute_paths,
    clippy::cast_lossless,
    clippy::cast_possible_truncation,
    clippy::uninlined_format_args,
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    clippy::too_many_lines,
    clippy::cognitive_complexity,
    clippy::wildcard_imports,
    unused_qualifications,
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    clippy::unwrap_used,
    clippy::panic,
    clippy::needless_pass_by_value,
    clippy::semicolon_if_nothing_returned,
    clippy::str_to_string,
    reason = "generated code"
)]

include!(concat!(env!("OUT_DIR"), "/mod.rs"));
