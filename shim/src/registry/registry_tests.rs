//! Names, lives and what the dead leave.

use super::*;
use crate::record::tests::record;

fn registry() -> (tempfile::TempDir, Registry) {
    let folder = tempfile::tempdir().unwrap();
    let registry = Registry::open(folder.path().join("state")).unwrap();
    (folder, registry)
}

#[test]
fn a_name_can_be_claimed_once_and_is_free_again_after_the_end() {
    let (_folder, registry) = registry();
    let first = registry.claim(record("a")).unwrap();
    let second = registry.claim(record("a")).unwrap_err();
    assert!(matches!(second, RegistryError::InUse { .. }), "{second}");
    drop(first);
    assert!(registry.list().unwrap().is_empty());
    drop(registry.claim(record("a")).unwrap());
}

#[test]
fn what_a_dead_supervisor_left_is_replaced() {
    let (_folder, registry) = registry();
    let mut dead = record("a");
    dead.supervisor.start_time += 1;
    std::mem::forget(registry.claim(dead).unwrap());
    assert_eq!(registry.list().unwrap().iter().map(Life::of).collect::<Vec<_>>(), [Life::Dead]);
    let claimed = registry.claim(record("a")).unwrap();
    assert_eq!(Life::of(claimed.record()), Life::Running);
}

#[test]
fn an_ended_sandbox_keeps_its_name_until_it_is_removed() {
    let (_folder, registry) = registry();
    registry.claim(record("a")).unwrap().keep(3).unwrap();
    assert!(registry.claim(record("a")).is_err());
    assert_eq!(Life::of(&registry.list().unwrap()[0]), Life::Exited(3));
    registry.remove(&"a".parse().unwrap()).unwrap();
    assert!(registry.remove(&"a".parse().unwrap()).is_err());
}

#[test]
fn what_a_dead_supervisor_left_goes_with_the_next_claim_unless_it_has_a_log() {
    let (_folder, registry) = registry();
    for name in ["a", "b"] {
        let mut dead = record(name);
        dead.supervisor.start_time += 1;
        dead.children = vec![dead.supervisor.clone()];
        std::mem::forget(registry.claim(dead).unwrap());
        if name == "a" {
            let (_, files) = registry.find(&"a".parse().unwrap()).unwrap();
            fs::write(files.output(), "").unwrap();
        }
    }
    let _next = registry.claim(record("c")).unwrap();
    let left = registry.list().unwrap();
    let names: Vec<&str> = left.iter().map(|record| record.name.as_str()).collect();
    assert_eq!(names, ["a", "c"]);
    assert_eq!((Life::of(&left[0]), left[0].children.len()), (Life::Dead, 0));
}

#[test]
fn a_running_sandbox_is_not_removed() {
    let (_folder, registry) = registry();
    let _running = registry.claim(record("a")).unwrap();
    let error = registry.remove(&"a".parse().unwrap()).unwrap_err();
    assert!(matches!(error, RegistryError::Running(_)), "{error}");
}

#[test]
fn two_sandboxes_get_different_addresses() {
    let (_folder, registry) = registry();
    let mut one = registry.claim(record("a")).unwrap();
    let mut other = registry.claim(record("b")).unwrap();
    assert_ne!(one.reserve_network(None).unwrap(), other.reserve_network(None).unwrap());
}
