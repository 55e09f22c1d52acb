//! Follows a folder of YAML files: Services, `EndpointSlices` and Pods without an API server.
//!
//! Files may hold several documents, and Lists. What can't be read is reported by its file; the rest
//! counts, and of a file that can't be read at all what it last said. So does an empty file: most
//! programs empty a file before they write it. To remove objects, remove their file or their text.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, Result};
use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{EventKind, RecursiveMode, Watcher};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::mpsc;

use super::{Kind, Update, raw, strict};
use crate::model::ObjectName;

/// Follows the folder until nobody listens any more.
///
/// # Errors
/// If there is no such folder, or it can't be watched.
pub async fn follow(
    folder: PathBuf,
    node: String,
    kinds: Vec<Kind>,
    updates: mpsc::Sender<Update>,
) -> Result<()> {
    // One slot: a change during a reading causes one more, and more changes no more than that.
    let (wake, mut changes) = mpsc::channel::<()>(1);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| is_change(event.kind)) {
            let _ = wake.try_send(());
        }
    })?;
    let unwatchable = || format!("cannot watch the manifests in {}", folder.display());
    watcher.watch(&folder, RecursiveMode::NonRecursive).with_context(unwatchable)?;
    let mut files = BTreeMap::new();
    loop {
        read_all(&folder, &mut files).with_context(unwatchable)?;
        if tell(&files, &node, &kinds, &updates).await.is_err() || changes.recv().await.is_none() {
            return Ok(());
        }
    }
}

/// Whether a file may say something else now. While it is written it says nothing that counts.
fn is_change(event: EventKind) -> bool {
    match event {
        EventKind::Access(access) => access == AccessKind::Close(AccessMode::Write),
        EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Metadata(_)) => false,
        _ => true,
    }
}

/// The text of each file and the objects in it.
type Files = BTreeMap<PathBuf, (String, Vec<Value>)>;

fn read_all(folder: &Path, files: &mut Files) -> io::Result<()> {
    let mut found = HashSet::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("yaml" | "yml" | "json")) {
            found.insert(path);
        }
    }
    files.retain(|path, _| found.contains(path));
    for path in found {
        match fs::read_to_string(&path) {
            Ok(text) if text.is_empty() => {}
            Ok(text) => {
                let (known, objects) = files.entry(path.clone()).or_default();
                // What is wrong with a file is said once.
                if *known != text {
                    *objects = documents(&path, &text, objects);
                    *known = text;
                }
            }
            Err(error) => tracing::warn!("{}: {error}; what it last said counts", path.display()),
        }
    }
    Ok(())
}

/// The objects in a file, Lists opened. If a document can't be read, the file's earlier objects that
/// the others do not replace are kept: half-written YAML must not delete a Service.
fn documents(path: &Path, text: &str, known: &[Value]) -> Vec<Value> {
    let mut objects = Vec::new();
    let mut broken = false;
    for (position, document) in text.split("\n---").enumerate() {
        // The rest of a separator's line, such as a comment.
        let document = if position == 0 { document } else { after_line(document) };
        match serde_saphyr::from_str::<Value>(document) {
            Ok(value) => open_lists(value, &mut objects),
            Err(error) => {
                broken = true;
                let (path, number) = (path.display(), position + 1);
                tracing::warn!("{path}: document {number} is no YAML and is left out: {error}");
            }
        }
    }
    objects.retain(|object| is_named(path, object));
    objects.iter().for_each(|object| complain(path, object, known));
    if broken {
        let kept =
            known.iter().filter(|old| objects.iter().all(|new| identity(new) != identity(old)));
        let kept: Vec<Value> = kept.cloned().collect();
        objects.extend(kept);
    }
    objects
}

/// Whether an object says what it is. What is of no kind that we follow need not.
fn is_named(path: &Path, object: &Value) -> bool {
    let path = path.display();
    let Some(kind) = kind(object) else {
        tracing::warn!("{path}: a document without a kind is left out");
        return false;
    };
    let name = object.get("metadata").and_then(|meta| meta.get("name")).and_then(Value::as_str);
    let named = name.is_some_and(|name| !name.is_empty());
    if !named {
        tracing::warn!("{path}: a {kind} without a name is left out");
    }
    named
}

/// Says what the API would not take, unless it was said of the same object before; what can be read counts.
fn complain(path: &Path, object: &Value, known: &[Value]) {
    if known.contains(object) {
        return;
    }
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or("?").to_owned();
    let (kind, name) = (text(object.get("kind")), text(object.pointer("/metadata/name")));
    for complaint in strict::complaints(&kind, object) {
        tracing::warn!("{}: {kind} {name}: the API would refuse it: {complaint}", path.display());
    }
}

fn after_line(document: &str) -> &str {
    document.split_once('\n').map_or("", |(_, rest)| rest)
}

fn open_lists(value: Value, objects: &mut Vec<Value>) {
    let is_list = kind(&value).is_some_and(|kind| kind.ends_with("List"));
    match value {
        Value::Object(mut list) if is_list => {
            if let Some(Value::Array(items)) = list.remove("items") {
                objects.extend(items);
            }
        }
        Value::Object(_) => objects.push(value),
        _ => {}
    }
}

fn kind(value: &Value) -> Option<&str> {
    value.get("kind")?.as_str()
}

fn identity(value: &Value) -> (Option<&Value>, Option<&Value>, Option<&Value>) {
    let meta = |field| value.get("metadata").and_then(|meta| meta.get(field));
    (value.get("kind"), meta("namespace"), meta("name"))
}

/// Tells of all objects, as a list of each kind. The node needs no manifest.
async fn tell(
    files: &Files,
    node: &str,
    kinds: &[Kind],
    updates: &mpsc::Sender<Update>,
) -> Result<(), mpsc::error::SendError<Update>> {
    let mut seen: BTreeMap<&str, HashSet<ObjectName>> = BTreeMap::new();
    for (_, objects) in files.values() {
        for object in objects {
            let Some((kind, name, update)) = update(object) else { continue };
            if seen.entry(kind).or_default().insert(name) {
                updates.send(update).await?;
            }
        }
    }
    for kind in kinds.iter().copied() {
        let listed = match kind {
            Kind::Services => seen.remove("Service"),
            Kind::Slices => seen.remove("EndpointSlice"),
            Kind::Pods => seen.remove("Pod"),
            Kind::Nodes => Some(HashSet::from([ObjectName::new("", node)])),
        };
        updates.send(Update::Listed(kind, listed.unwrap_or_default())).await?;
    }
    Ok(())
}

fn update(object: &Value) -> Option<(&str, ObjectName, Update)> {
    let kind = kind(object)?;
    let mut object = object.clone();
    let meta = object.get_mut("metadata")?.as_object_mut()?;
    meta.entry("namespace").or_insert_with(|| "default".into());
    let meta = raw::Meta::deserialize(&*meta).unwrap_or_default();
    // The types take anything: an error is not to be expected.
    let update = match kind {
        "Service" => Update::Service(Box::new(serde_json::from_value(object).ok()?)),
        "EndpointSlice" => Update::Slice(serde_json::from_value(object).ok()?),
        "Pod" => Update::Pod(Box::new(serde_json::from_value(object).ok()?)),
        _ => return None,
    };
    Some((kind, ObjectName::new(&meta.namespace, &meta.name), update))
}
