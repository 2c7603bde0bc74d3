//! A container's bundle: what its `config.json` says about the sandbox that it belongs to.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespaceType, Spec};

/// The largest `config.json`, in bytes.
const MAX_SPEC_BYTES: u64 = 16 << 20;
/// The longest id of containerd's, in bytes.
const MAX_ID_BYTES: usize = 76;

const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
const GROUP: &str = "io.containerd.runc.v2.group";

/// Why a bundle can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// It can't be read.
    #[error("can't read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is too large.
    #[error("{} is larger than 16 MiB", .0.display())]
    TooLarge(PathBuf),
    /// It is no specification.
    #[error("{} is no OCI specification", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
}

/// Whether `id` can be a container's, a process's or a sandbox's: letters and digits, and between
/// them single `_`, `.`, `-`; so it is a file name and no path.
pub(super) fn is_id(id: &str) -> bool {
    let is_alone = |c: char| matches!(c, '_' | '.' | '-');
    id.len() <= MAX_ID_BYTES
        && !id.is_empty()
        && id.chars().all(|c| c.is_ascii_alphanumeric() || is_alone(c))
        && !id.starts_with(is_alone)
        && !id.ends_with(is_alone)
}

/// The specification in `bundle`; none if there is no such file.
///
/// # Errors
///
/// Fails if it can't be read or is none.
pub(super) fn read_spec(bundle: &Path) -> Result<Option<Spec>, BundleError> {
    let path = bundle.join("config.json");
    let mut text = Vec::new();
    let read =
        File::open(&path).and_then(|file| file.take(MAX_SPEC_BYTES + 1).read_to_end(&mut text));
    match read {
        Ok(_) if text.len() as u64 > MAX_SPEC_BYTES => Err(BundleError::TooLarge(path)),
        Ok(_) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| BundleError::Malformed { path, source }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(BundleError::Read { path, source }),
    }
}

fn annotation<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    spec.annotations().as_ref()?.get(name).map(String::as_str).filter(|value| !value.is_empty())
}

/// The sandbox that the container `id` belongs to: its own, unless it says another one.
#[must_use]
pub(super) fn sandbox_of(id: &str, spec: Option<&Spec>) -> String {
    let named = spec.and_then(|spec| annotation(spec, GROUP).or(annotation(spec, SANDBOX_ID)));
    named.filter(|named| is_id(named)).unwrap_or(id).to_owned()
}

/// Whether the container is to join a sandbox that runs.
pub(super) fn joins(spec: &Spec) -> bool {
    annotation(spec, CONTAINER_TYPE) == Some("container")
}

/// The annotations.
pub(super) fn annotations(spec: &Spec) -> HashMap<String, String> {
    spec.annotations().clone().unwrap_or_default()
}

/// The network namespace that it is to be in, if that has a path.
pub(super) fn netns(spec: &Spec) -> Option<PathBuf> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    let network = namespaces.iter().find(|one| one.typ() == LinuxNamespaceType::Network)?;
    network.path().clone()
}

/// The pod's cgroup on the host: in which the container's own would be.
pub(super) fn cgroup_parent(spec: &Spec) -> Option<String> {
    let path = spec.linux().as_ref()?.cgroups_path().as_ref()?.to_str()?;
    // systemd's "slice:prefix:name", or a path.
    let parent = match path.split_once(':') {
        Some((slice, _)) => slice,
        None => path.rsplit_once('/')?.0,
    };
    Some(parent.to_owned()).filter(|parent| !parent.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(annotations: &serde_json::Value, resources: &serde_json::Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "annotations": annotations,
            "linux": {"resources": resources},
        }))
        .unwrap()
    }

    #[test]
    fn an_id_is_never_a_path() {
        for id in ["", ".", "..", "a/b", "-a", "a-", "a b", "../x", "a\n", &"x".repeat(77)] {
            assert!(!is_id(id), "{id:?}");
        }
        for id in ["a", "web-1", "A.b_c", &"x".repeat(76)] {
            assert!(is_id(id), "{id:?}");
        }
    }

    #[test]
    fn a_container_says_its_sandbox() {
        let joins_pod = spec(&json!({CONTAINER_TYPE: "container", SANDBOX_ID: "pod"}), &json!({}));
        assert_eq!(sandbox_of("web", Some(&joins_pod)), "pod");
        assert!(joins(&joins_pod));
        let alone = spec(&json!({}), &json!({}));
        assert_eq!(sandbox_of("web", Some(&alone)), "web");
        assert!(!joins(&alone));
        let bad = spec(&json!({SANDBOX_ID: "../pod"}), &json!({}));
        assert_eq!(sandbox_of("web", Some(&bad)), "web");
        assert_eq!(sandbox_of("web", None), "web");
    }

    #[test]
    fn a_bundle_without_a_specification_is_no_error_and_a_broken_one_is() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read_spec(folder.path()).unwrap().is_none());
        std::fs::write(folder.path().join("config.json"), "{").unwrap();
        assert!(matches!(read_spec(folder.path()), Err(BundleError::Malformed { .. })));
    }
}
