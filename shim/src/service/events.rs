//! What containerd is told of: each event as topic and message.

use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::{
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
        TaskResumed, TaskStart,
    },
    shim::event::Envelope,
    topics,
};
use protobuf::{
    Message, MessageFull,
    well_known_types::{any::Any, timestamp::Timestamp},
};

/// An event of a task.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Event {
    Create(TaskCreate),
    Start(TaskStart),
    ExecAdded(TaskExecAdded),
    ExecStarted(TaskExecStarted),
    Exit(TaskExit),
    Delete(TaskDelete),
    OutOfMemory(TaskOOM),
    Paused(TaskPaused),
    Resumed(TaskResumed),
}

impl Event {
    fn topic(&self) -> &'static str {
        match self {
            Self::Create(_) => topics::TASK_CREATE_EVENT_TOPIC,
            Self::Start(_) => topics::TASK_START_EVENT_TOPIC,
            Self::ExecAdded(_) => topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            Self::ExecStarted(_) => topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            Self::Exit(_) => topics::TASK_EXIT_EVENT_TOPIC,
            Self::Delete(_) => topics::TASK_DELETE_EVENT_TOPIC,
            Self::OutOfMemory(_) => topics::TASK_OOM_EVENT_TOPIC,
            Self::Paused(_) => topics::TASK_PAUSED_EVENT_TOPIC,
            Self::Resumed(_) => topics::TASK_RESUMED_EVENT_TOPIC,
        }
    }

    fn message(&self) -> Any {
        match self {
            Self::Create(message) => any(message),
            Self::Start(message) => any(message),
            Self::ExecAdded(message) => any(message),
            Self::ExecStarted(message) => any(message),
            Self::Exit(message) => any(message),
            Self::Delete(message) => any(message),
            Self::OutOfMemory(message) => any(message),
            Self::Paused(message) => any(message),
            Self::Resumed(message) => any(message),
        }
    }

    /// As containerd takes it.
    pub(super) fn envelope(&self, namespace: &str) -> Envelope {
        let mut envelope = Envelope::new();
        envelope.set_timestamp(timestamp(SystemTime::now()));
        envelope.set_namespace(namespace.to_owned());
        envelope.set_topic(self.topic().to_owned());
        envelope.set_event(self.message());
        envelope
    }
}

/// A message with its name, as containerd writes it: without the host part of a URL.
pub(super) fn any<M: MessageFull>(message: &M) -> Any {
    Any { type_url: M::descriptor().full_name().to_owned(), value: bytes(message), ..Any::new() }
}

/// A message of ours, which has no required fields, as bytes.
pub(super) fn bytes(message: &impl Message) -> Vec<u8> {
    message.write_to_bytes().unwrap_or_default()
}

/// A moment as the protocol has it.
pub(super) fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
        ..Timestamp::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_named_as_containerd_names_it() {
        let exit = TaskExit { container_id: "web".to_owned(), exit_status: 7, ..TaskExit::new() };
        let envelope = Event::Exit(exit.clone()).envelope("k8s.io");
        assert_eq!(
            (envelope.topic.as_str(), envelope.namespace.as_str()),
            ("/tasks/exit", "k8s.io")
        );
        assert_eq!(envelope.event.type_url, "containerd.events.TaskExit");
        assert_eq!(TaskExit::parse_from_bytes(&envelope.event.value).unwrap(), exit);
        assert!(envelope.timestamp.seconds > 0);
    }
}
