//! Kernel modules, loaded in the order of `/etc/nacre/modules`.
//!
//! The list is made with the initramfs: dependencies come first, each line is the path of an
//! uncompressed module, optionally followed by its parameters. A module that fails is logged and
//! the rest goes on: what needed it will say so.

use std::{
    ffi::CString,
    fs::{self, File},
    io,
};

use rustix::{io::Errno, system::finit_module};

const LIST: &str = "/etc/nacre/modules";

/// Loads what the list names; no list is no module.
pub(crate) fn load_listed() {
    let list = match fs::read_to_string(LIST) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => {
            log::error!("can't read {LIST}: {error}");
            return;
        }
    };
    for (path, params) in entries(&list) {
        if let Err(error) = load(path, params) {
            log::error!("can't load the module {path}: {error}");
        }
    }
}

/// Path and parameters of each line that is neither empty nor a comment.
fn entries(list: &str) -> impl Iterator<Item = (&str, &str)> {
    list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).map(
        |line| match line.split_once(char::is_whitespace) {
            Some((path, params)) => (path, params.trim()),
            None => (line, ""),
        },
    )
}

fn load(path: &str, params: &str) -> io::Result<()> {
    let params = CString::new(params)?;
    match finit_module(File::open(path)?, &params, 0) {
        // Built in, or loaded already.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::entries;

    #[test]
    fn a_list_has_comments_paths_and_parameters() {
        let list = "# first\n\n/m/a.ko\n  /m/b.ko  x=1 y=2 \n";
        let found: Vec<_> = entries(list).collect();
        assert_eq!(found, [("/m/a.ko", ""), ("/m/b.ko", "x=1 y=2")]);
    }
}
