//! Whole images, written as a layout by the test.

use std::io::Write;

use flate2::{Compression as Level, write::GzEncoder};
use proptest::prelude::{any, prop_assert, proptest};
use proptest::{collection, sample};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::*;

/// Writes `content` as a blob and answers its descriptor.
fn blob(layout: &Path, media_type: &str, content: &[u8]) -> serde_json::Value {
    let digest: String = Sha256::digest(content).iter().map(|b| format!("{b:02x}")).collect();
    let folder = layout.join("blobs/sha256");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(&digest), content).unwrap();
    json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len()})
}

fn tar_of(files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(u64::try_from(content.len()).unwrap());
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        builder.append_data(&mut header, name, content.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Level::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An image of two layers, the second of which hides a file of the first.
fn write_layout(layout: &Path) {
    let layer = "application/vnd.oci.image.layer.v1.tar";
    let first = tar_of(&[("etc/passwd", "web:x:33:34::/srv:/bin/sh\n"), ("old", "x")]);
    let second = gzip(&tar_of(&[("new", "y"), (".wh.old", "")]));
    let layers = [blob(layout, layer, &first), blob(layout, &format!("{layer}+gzip"), &second)];
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": []},
        "config": {"Env": ["A=1"], "Entrypoint": ["/bin/echo"], "Cmd": ["hi"], "User": "web",
                   "WorkingDir": "/srv"},
    });
    let config =
        blob(layout, "application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers});
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let mut ours = blob(layout, media_type, manifest.to_string().as_bytes());
    ours["platform"] = json!({"os": "linux", "architecture": "amd64"});
    let mut foreign = blob(layout, media_type, b"not for us");
    foreign["platform"] = json!({"os": "linux", "architecture": "arm64"});
    let index = json!({"schemaVersion": 2, "manifests": [foreign, ours]});
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
}

#[test]
fn an_image_is_unpacked_once_and_its_configuration_read() {
    let folder = tempfile::tempdir().unwrap();
    let (layout, cache) = (folder.path().join("layout"), folder.path().join("cache"));
    fs::create_dir(&layout).unwrap();
    write_layout(&layout);
    let image = Image::open(&layout, Cancel::default()).unwrap();
    assert_eq!(image.defaults.entrypoint, ["/bin/echo"]);
    assert_eq!(
        (image.defaults.user.as_str(), image.defaults.working_dir.as_str()),
        ("web", "/srv")
    );
    let rootfs = image.unpack(&cache).unwrap();
    assert_eq!(fs::read_to_string(rootfs.join("new")).unwrap(), "y");
    assert!(!rootfs.join("old").exists());
    fs::write(rootfs.join("mark"), "").unwrap();
    assert!(image.unpack(&cache).unwrap().join("mark").exists());
}

#[test]
fn a_tar_archive_of_a_layout_is_the_same_image() {
    let folder = tempfile::tempdir().unwrap();
    let layout = folder.path().join("layout");
    fs::create_dir(&layout).unwrap();
    write_layout(&layout);
    let archive = folder.path().join("image.tar");
    let mut builder = tar::Builder::new(File::create(&archive).unwrap());
    builder.append_dir_all("./", &layout).unwrap();
    builder.finish().unwrap();
    let image = Image::open(&archive, Cancel::default()).unwrap();
    let rootfs = image.unpack(&folder.path().join("cache")).unwrap();
    assert_eq!(fs::read_to_string(rootfs.join("new")).unwrap(), "y");
}

#[test]
fn a_blob_with_other_content_is_refused_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let layout = folder.path().join("layout");
    fs::create_dir(&layout).unwrap();
    write_layout(&layout);
    let image = Image::open(&layout, Cancel::default()).unwrap();
    let digest = image.layers[0].digest().digest().to_owned();
    let good = fs::read(layout.join("blobs/sha256").join(&digest)).unwrap();
    let mut bad = good;
    bad[520] ^= 1;
    fs::write(layout.join("blobs/sha256").join(&digest), bad).unwrap();
    let cache = folder.path().join("cache");
    let error = image.unpack(&cache).unwrap_err();
    assert!(
        matches!(&error, ImageError::Source { source: SourceError::Digest(_), .. }),
        "{error:?}"
    );
    assert_eq!(fs::read_dir(cache.join("images")).unwrap().count(), 0);
}

#[test]
fn unpacking_can_be_called_off() {
    let folder = tempfile::tempdir().unwrap();
    write_layout(folder.path());
    let cancel = Cancel::default();
    let image = Image::open(folder.path(), cancel.clone()).unwrap();
    cancel.cancel();
    let cache = folder.path().join("cache");
    image.unpack(&cache).unwrap_err();
    assert_eq!(fs::read_dir(cache.join("images")).unwrap().count(), 0);
}

#[test]
fn what_is_no_image_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let open = |path: &Path| match Image::open(path, Cancel::default()) {
        Err(ImageError::Source { source, .. }) => source,
        other => panic!("{other:?}"),
    };
    assert!(matches!(open(&folder.path().join("none")), SourceError::Open(..)));
    assert!(matches!(open(folder.path()), SourceError::NoLayout(..)));
    let compressed = folder.path().join("image.tar.gz");
    fs::write(&compressed, gzip(&tar_of(&[]))).unwrap();
    assert!(matches!(open(&compressed), SourceError::Compressed(_)));
    fs::write(folder.path().join("index.json"), "{").unwrap();
    assert!(matches!(open(folder.path()), SourceError::Json(..)));
}

proptest! {
    #[test]
    fn no_damage_to_an_image_makes_more_of_it_than_an_error(
        file in any::<sample::Index>(),
        damage in collection::vec((any::<sample::Index>(), any::<u8>()), 1..6),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let (layout, cache) = (folder.path().join("layout"), folder.path().join("cache"));
        fs::create_dir(&layout).unwrap();
        write_layout(&layout);
        let blobs = fs::read_dir(layout.join("blobs/sha256")).unwrap();
        let mut files: Vec<_> = blobs.map(|entry| entry.unwrap().path()).collect();
        files.push(layout.join("index.json"));
        files.sort();
        let file = file.get(&files);
        let mut bytes = fs::read(file).unwrap();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        fs::write(file, bytes).unwrap();
        let opened = Image::open(&layout, Cancel::default());
        if let Ok(unpacked) = opened.and_then(|image| image.unpack(&cache)) {
            prop_assert!(unpacked.starts_with(&cache), "{unpacked:?}");
        }
    }
}
