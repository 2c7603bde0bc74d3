//! Layers made by a friend and by a foe.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
};

use proptest::prelude::{Strategy, any, prop_assert, proptest};
use proptest::{collection, sample};
use tar::{Builder, Header};
use tempfile::TempDir;

use super::*;

/// A folder with a `root` to unpack into and a file beside it that must stay as it is.
struct Ground {
    folder: TempDir,
}

impl Ground {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("root")).unwrap();
        fs::write(folder.path().join("secret"), "secret").unwrap();
        Self { folder }
    }

    fn path(&self, inside: &str) -> std::path::PathBuf {
        self.folder.path().join("root").join(inside)
    }

    fn apply(&self, layer: Builder<Vec<u8>>) -> Result<(), LayerError> {
        let layer = layer.into_inner().unwrap();
        let mut target = Target::open(&self.path("")).unwrap();
        target.apply(layer.as_slice(), Pass::Whiteouts)?;
        target.apply(layer.as_slice(), Pass::Entries)
    }

    fn is_untouched_outside(&self) -> bool {
        let mut names: Vec<_> =
            fs::read_dir(self.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names == ["root", "secret"]
            && fs::read_to_string(self.folder.path().join("secret")).unwrap() == "secret"
            && fs::metadata(self.folder.path().join("secret")).unwrap().nlink() == 1
    }
}

fn header(kind: EntryType, name: &str, size: usize) -> Header {
    let mut header = Header::new_ustar();
    // Written as bytes: the crate's own setter refuses the names that a foe uses.
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(u64::try_from(size).unwrap());
    header
}

fn add(layer: &mut Builder<Vec<u8>>, kind: EntryType, name: &str, content: &str) {
    let mut header = header(kind, name, 0);
    if matches!(kind, EntryType::Symlink | EntryType::Link) {
        header.as_old_mut().linkname[..content.len()].copy_from_slice(content.as_bytes());
        header.set_cksum();
        layer.append(&header, &[][..]).unwrap();
    } else {
        header.set_size(u64::try_from(content.len()).unwrap());
        header.set_cksum();
        layer.append(&header, content.as_bytes()).unwrap();
    }
}

fn layer(entries: &[(EntryType, &str, &str)]) -> Builder<Vec<u8>> {
    let mut layer = Builder::new(Vec::new());
    entries.iter().for_each(|(kind, name, content)| add(&mut layer, *kind, name, content));
    layer
}

#[test]
fn files_folders_and_links_are_made() {
    let ground = Ground::new();
    ground
        .apply(layer(&[
            (EntryType::Directory, "bin", ""),
            (EntryType::Regular, "bin/busybox", "program"),
            (EntryType::Link, "bin/ls", "bin/busybox"),
            (EntryType::Symlink, "sbin", "bin"),
            (EntryType::Regular, "sbin/init", "init"),
            (EntryType::Regular, "deep/er/file", "x"),
        ]))
        .unwrap();
    assert_eq!(fs::read_to_string(ground.path("bin/ls")).unwrap(), "program");
    assert_eq!(fs::read_to_string(ground.path("bin/init")).unwrap(), "init");
    assert!(ground.path("deep/er/file").exists());
}

#[test]
fn set_uid_bits_are_kept() {
    let ground = Ground::new();
    let mut builder = Builder::new(Vec::new());
    let mut header = header(EntryType::Regular, "su", 0);
    header.set_mode(0o4755);
    header.set_uid(0);
    header.set_gid(42);
    header.set_cksum();
    builder.append(&header, &[][..]).unwrap();
    ground.apply(builder).unwrap();
    let metadata = fs::metadata(ground.path("su")).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o4755);
    if rustix::process::geteuid().is_root() {
        assert_eq!(metadata.gid(), 42);
    }
}

#[test]
fn a_climbing_name_is_refused() {
    for name in ["../evil", "a/../../evil"] {
        let ground = Ground::new();
        let error = ground.apply(layer(&[(EntryType::Regular, name, "x")])).unwrap_err();
        assert!(matches!(error, LayerError::Entry { .. }), "{error}");
        assert!(ground.is_untouched_outside());
    }
}

#[test]
fn an_absolute_name_stays_inside() {
    let ground = Ground::new();
    ground.apply(layer(&[(EntryType::Regular, "/etc/nacre-evil", "x")])).unwrap();
    assert!(ground.path("etc/nacre-evil").exists());
    assert!(!Path::new("/etc/nacre-evil").exists());
}

#[test]
fn writing_through_a_symbolic_link_stays_inside() {
    for to in ["..", "../..", "/"] {
        let ground = Ground::new();
        ground
            .apply(layer(&[
                (EntryType::Symlink, "way", to),
                (EntryType::Regular, "way/secret", "overwritten"),
            ]))
            .unwrap();
        assert!(ground.is_untouched_outside(), "{to}");
        assert_eq!(fs::read_to_string(ground.path("secret")).unwrap(), "overwritten");
    }
}

#[test]
fn a_file_does_not_write_through_a_link_of_its_own_name() {
    let ground = Ground::new();
    symlink("../secret", ground.path("file")).unwrap();
    ground.apply(layer(&[(EntryType::Regular, "file", "new")])).unwrap();
    assert!(ground.is_untouched_outside());
    assert!(fs::symlink_metadata(ground.path("file")).unwrap().is_file());
}

#[test]
fn hard_links_lead_nowhere_outside() {
    for (by, to) in [("../secret", ""), ("way/secret", "..")] {
        let ground = Ground::new();
        let mut entries = vec![(EntryType::Link, "stolen", by)];
        if !to.is_empty() {
            entries.insert(0, (EntryType::Symlink, "way", to));
        }
        assert!(ground.apply(layer(&entries)).is_err(), "{by}");
        assert!(ground.is_untouched_outside());
    }
}

#[test]
fn device_nodes_are_left_out() {
    let ground = Ground::new();
    ground.apply(layer(&[(EntryType::Block, "sda", ""), (EntryType::Char, "zero", "")])).unwrap();
    assert_eq!(fs::read_dir(ground.path("")).unwrap().count(), 0);
}

#[test]
fn a_whiteout_removes_what_is_below_and_is_no_file() {
    let ground = Ground::new();
    ground
        .apply(layer(&[(EntryType::Regular, "a/old", "x"), (EntryType::Regular, "a/kept", "x")]))
        .unwrap();
    ground.apply(layer(&[(EntryType::Regular, "a/.wh.old", "")])).unwrap();
    assert!(!ground.path("a/old").exists());
    assert!(ground.path("a/kept").exists());
    assert!(!ground.path("a/.wh.old").exists());
}

#[test]
fn an_opaque_whiteout_spares_the_entries_of_its_own_layer() {
    let ground = Ground::new();
    ground.apply(layer(&[(EntryType::Regular, "a/b/old", "x")])).unwrap();
    ground
        .apply(layer(&[
            (EntryType::Regular, "a/new", "y"),
            (EntryType::Regular, "a/.wh..wh..opq", ""),
        ]))
        .unwrap();
    assert!(!ground.path("a/b").exists());
    assert_eq!(fs::read_to_string(ground.path("a/new")).unwrap(), "y");
}

#[test]
fn a_whiteout_does_not_reach_outside() {
    let ground = Ground::new();
    symlink("..", ground.path("way")).unwrap();
    for name in ["way/.wh.secret", ".wh...", "../.wh.secret", ".wh."] {
        // Refused or without effect: either will do.
        let applied = ground.apply(layer(&[(EntryType::Regular, name, "")]));
        assert!(ground.is_untouched_outside(), "{name}: {applied:?}");
    }
}

#[test]
fn a_damaged_archive_is_an_error_and_no_panic() {
    let ground = Ground::new();
    let mut target = Target::open(&ground.path("")).unwrap();
    let error = target.apply(&[0x41; 2000][..], Pass::Entries).unwrap_err();
    assert!(matches!(error, LayerError::Archive(_)), "{error}");
}

/// Names and link targets as a foe would combine them.
fn names() -> impl Strategy<Value = String> {
    let part = sample::select(vec![
        "..",
        ".",
        "",
        "a",
        "b",
        "root",
        "secret",
        ".wh.a",
        ".wh.b",
        ".wh.secret",
        ".wh...",
        ".wh..wh..opq",
    ]);
    (any::<bool>(), collection::vec(part, 1..5)).prop_map(|(absolute, parts)| {
        let start = if absolute { "/" } else { "" };
        format!("{start}{}", parts.join("/"))
    })
}

fn entries() -> impl Strategy<Value = Vec<(EntryType, String, String)>> {
    let kind = sample::select(vec![
        EntryType::Regular,
        EntryType::Directory,
        EntryType::Symlink,
        EntryType::Link,
        EntryType::Fifo,
        EntryType::Char,
    ]);
    collection::vec((kind, names(), names()), 1..12)
}

proptest! {
    #[test]
    fn no_order_of_entries_reaches_outside(entries in entries()) {
        let ground = Ground::new();
        let entries: Vec<_> =
            entries.iter().map(|(kind, name, to)| (*kind, name.as_str(), to.as_str())).collect();
        let applied = ground.apply(layer(&entries));
        prop_assert!(ground.is_untouched_outside(), "{applied:?}");
    }

    #[test]
    fn no_damage_to_an_archive_reaches_outside_or_panics(
        damage in collection::vec((any::<sample::Index>(), any::<u8>()), 1..8),
    ) {
        let ground = Ground::new();
        let mut bytes = layer(&[
            (EntryType::Directory, "a", ""),
            (EntryType::Symlink, "b", "../secret"),
            (EntryType::Regular, "a/file", "content"),
        ])
        .into_inner()
        .unwrap();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let mut target = Target::open(&ground.path("")).unwrap();
        for pass in [Pass::Whiteouts, Pass::Entries] {
            // Refused or not: either will do.
            target.apply(bytes.as_slice(), pass).ok();
        }
        prop_assert!(ground.is_untouched_outside());
    }
}
