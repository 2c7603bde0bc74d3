//! What happens in the guest unasked, numbered and kept for a host that asks later.

use std::collections::VecDeque;

use nacre_proto::agent::{ContainerRequest, Event, event::What};
use tokio::sync::watch;

use crate::ids::ContainerId;

/// How many events are kept; a host that is further behind sees a gap in the numbers.
const KEPT: usize = 256;

#[derive(Debug, Default)]
struct History {
    /// The number of the last event.
    last: u64,
    /// The containers of the last events, in which the out-of-memory killer struck.
    out_of_memory: VecDeque<ContainerId>,
}

impl History {
    /// The first that is kept after the one of this number.
    fn after(&self, number: u64) -> Option<Event> {
        let kept = u64::try_from(self.out_of_memory.len()).unwrap_or(self.last);
        let first = self.last - kept + 1;
        let wanted = number.saturating_add(1).max(first);
        let index = usize::try_from(wanted - first).ok()?;
        let container = self.out_of_memory.get(index)?;
        let container_id = container.to_string();
        let request = ContainerRequest { container_id, ..ContainerRequest::new() };
        let what = Some(What::OutOfMemory(request));
        Some(Event { number: wanted, what, ..Event::new() })
    }
}

/// The events of this guest.
#[derive(Debug)]
pub(crate) struct Events {
    history: watch::Sender<History>,
}

impl Events {
    /// Nothing has happened.
    pub(crate) fn new() -> Self {
        Self { history: watch::Sender::new(History::default()) }
    }

    /// The out-of-memory killer struck.
    pub(crate) fn out_of_memory(&self, container: ContainerId) {
        self.history.send_modify(|history| {
            history.last += 1;
            history.out_of_memory.push_back(container);
            if history.out_of_memory.len() > KEPT {
                history.out_of_memory.pop_front();
            }
        });
    }

    /// The event after the one of this number, as soon as there is one.
    pub(crate) async fn next(&self, after: u64) -> Event {
        let mut history = self.history.subscribe();
        loop {
            if let Some(event) = history.borrow_and_update().after(after) {
                return event;
            }
            // The sender is in `self`, so this is never the end of the channel.
            if history.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn id(number: u64) -> ContainerId {
        ContainerId::parse(&format!("c{number}")).unwrap()
    }

    fn told(event: &Event) -> (u64, &str) {
        (event.number, &event.out_of_memory().container_id)
    }

    #[tokio::test]
    async fn events_are_told_in_their_order_also_to_who_waits() {
        let events = Arc::new(Events::new());
        let waiting = tokio::spawn({
            let events = Arc::clone(&events);
            async move { events.next(0).await }
        });
        tokio::task::yield_now().await;
        events.out_of_memory(id(1));
        events.out_of_memory(id(2));
        assert_eq!(told(&waiting.await.unwrap()), (1, "c1"));
        assert_eq!(told(&events.next(1).await), (2, "c2"));
        assert_eq!(told(&events.next(0).await), (1, "c1"));
    }

    #[tokio::test]
    async fn what_is_not_kept_any_more_is_a_gap_in_the_numbers() {
        let events = Events::new();
        for number in 1..=KEPT as u64 + 10 {
            events.out_of_memory(id(number));
        }
        assert_eq!(told(&events.next(0).await), (11, "c11"));
        assert_eq!(told(&events.next(12).await), (13, "c13"));
        let last = KEPT as u64 + 10;
        assert!(events.history.borrow().after(last).is_none());
        assert!(events.history.borrow().after(u64::MAX).is_none());
    }
}
