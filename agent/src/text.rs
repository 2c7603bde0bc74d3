//! Errors as one line of text: every message of the chain, outermost first.

use std::error::Error;

/// The messages of `error` and of its sources, joined by colons.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        // Some libraries repeat the source's text in their own message.
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        source = cause.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::chain;

    #[derive(Debug, thiserror::Error)]
    #[error("can't open the disk")]
    struct Outer(#[source] io::Error);

    #[test]
    fn a_chain_is_told_outermost_first() {
        assert_eq!(
            chain(&Outer(io::Error::other("no such disk"))),
            "can't open the disk: no such disk"
        );
    }
}
