//! Kubernetes Events: what `kubectl describe` shows to whoever owns an object (KP-107, KP-151).

use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::model::ObjectName;
use crate::watch::Source;

/// How many events may wait to be sent. What is more is lost: the log has it.
const QUEUE: usize = 256;
/// How long the API server may take for one.
const PATIENCE: Duration = Duration::from_secs(10);
/// Who reports.
const REPORTER: &str = "portal";

/// Something that an object's owner should know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Notice {
    /// The object's kind.
    pub kind: &'static str,
    /// Its name; the namespace is empty for a Node.
    pub name: ObjectName,
    /// Its UID.
    pub uid: String,
    /// Something is wrong.
    pub warns: bool,
    /// Why, in one word.
    pub reason: &'static str,
    /// What was tried, in one word.
    pub action: &'static str,
    /// What happened, in words.
    pub note: String,
}

/// Where notices go.
pub struct Events {
    notices: mpsc::Sender<Notice>,
}

impl Events {
    /// Sends notices to the API server from now on; nowhere if there is none.
    ///
    /// # Errors
    /// If there are no usable credentials.
    pub async fn start(
        source: &Source,
        node: &str,
        tasks: &mut JoinSet<Result<()>>,
    ) -> Result<Self> {
        let (notices, queue) = mpsc::channel(QUEUE);
        if let Source::Api(server) = source {
            tasks.spawn(send(server.connect().await?, node.to_owned(), queue));
        }
        Ok(Self { notices })
    }

    /// Sends a notice, without waiting for anything.
    pub fn tell(&self, notice: Notice) {
        let _ = self.notices.try_send(notice);
    }
}

/// Sends what comes, for as long as the agent runs.
async fn send(client: Client, node: String, mut queue: mpsc::Receiver<Notice>) -> Result<()> {
    let reporter = Reporter { controller: REPORTER.to_owned(), instance: Some(node) };
    let recorder = Recorder::new(client, reporter);
    while let Some(notice) = queue.recv().await {
        let reference = reference(&notice);
        let event = event(notice);
        let sent = timeout(PATIENCE, recorder.publish(&event, &reference)).await;
        let failure = match sent {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.to_string(),
            Err(late) => late.to_string(),
        };
        // Whatever it was about is in the log.
        tracing::debug!("event {} could not be sent: {failure}", event.reason);
    }
    // Nobody tells any more; the others go on.
    std::future::pending().await
}

fn event(notice: Notice) -> Event {
    Event {
        type_: if notice.warns { EventType::Warning } else { EventType::Normal },
        reason: notice.reason.to_owned(),
        note: Some(notice.note),
        action: notice.action.to_owned(),
        secondary: None,
    }
}

fn reference(notice: &Notice) -> ObjectReference {
    let ObjectName { namespace, name } = &notice.name;
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some(notice.kind.to_owned()),
        namespace: Some(namespace.to_string()).filter(|namespace| !namespace.is_empty()),
        name: Some(name.to_string()),
        uid: Some(notice.uid.clone()).filter(|uid| !uid.is_empty()),
        ..ObjectReference::default()
    }
}
